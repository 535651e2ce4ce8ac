"""Parameters that no layer with a definition uses, and batches that are not the first axis: attention, recurrence, tied weights.

Every network is compared with dense plain autograd on the same modules.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

import satchel
from conftest import Agree
from networks import Wired
from reference import Reference, contributions, jacobian
from satchel import backpack, extend
from satchel.extensions import (
    KFAC,
    KFLR,
    KFRA,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SumGradSquared,
    Variance,
)  # fmt: skip
from satchel.runtime.cost import forced
from test_lifetime import tensors_alive

N, T, D = 4, 3, 6
#: Features that need no more of a parameter than its individual pullbacks.
PULLED: list[Any] = [BatchGrad, BatchL2Grad, SumGradSquared, Variance, DiagGGNExact]


class Embedded(nn.Module):
    """A parameter that is added, or multiplied."""

    def __init__(self, *shape: int):
        super().__init__()
        self.value = nn.Parameter(torch.randn(shape))


class Sine(torch.autograd.Function):
    """Without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def attention(batch_first: bool, **options: Any) -> Callable[[], nn.Module]:
    def wire(m: Any, x: Tensor) -> Tensor:
        h = m.a(x if batch_first else x.transpose(0, 1))
        h = h + m.attention(h, h, h, need_weights=False)[0]
        return (h if batch_first else h.transpose(0, 1))[:, :, :2].flatten(1)

    return lambda: Wired(
        wire, a=nn.Linear(4, D), attention=nn.MultiheadAttention(D, 2, batch_first=batch_first, **options)
    )


def cross(batch_first: bool, **options: Any) -> Callable[[], nn.Module]:
    def wire(m: Any, x: Tensor) -> Tensor:
        h = x if batch_first else x.transpose(0, 1)
        queries = m.a(h)
        keys = queries.square()[..., : options.get("kdim", D)]
        out = m.attention(queries, keys, keys)[0]
        return (out if batch_first else out.transpose(0, 1))[:, :, :2].flatten(1)

    return lambda: Wired(
        wire, a=nn.Linear(4, D), attention=nn.MultiheadAttention(D, 2, batch_first=batch_first, **options)
    )


def encoder(batch_first: bool, norm_first: bool) -> Callable[[], nn.Module]:
    def wire(m: Any, x: Tensor) -> Tensor:
        h = m.layer(m.a(x) if batch_first else m.a(x).transpose(0, 1))
        return m.head((h if batch_first else h.transpose(0, 1)).mean(1))

    return lambda: Wired(
        wire,
        a=nn.Linear(4, 4),
        layer=nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=batch_first, norm_first=norm_first),
        head=nn.Linear(4, 3),
    )


def recurrent(kind: Any, batch_first: bool, **options: Any) -> Callable[[], nn.Module]:
    def wire(m: Any, x: Tensor) -> Tensor:
        h = m.cell(x if batch_first else x.transpose(0, 1))[0]
        return m.head(h[:, -1] if batch_first else h[-1])

    width = 3 * (2 if options.get("bidirectional") else 1)
    return lambda: Wired(wire, cell=kind(4, 3, batch_first=batch_first, **options), head=nn.Linear(width, 2))


class GPT(nn.Module):
    """A decoder in plain modules and functions, with the weights of the embedding at its output."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.positions = nn.Parameter(torch.randn(T, 4))
        self.norm, self.final = nn.LayerNorm(4), nn.LayerNorm(4)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens((x[:, :, 0] * 2).long() % 5) + self.positions
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.scale * self.out(mixed.transpose(1, 2).flatten(2))
        return F.linear(self.final(h), self.tokens.weight).transpose(1, 2)


def positions() -> nn.Module:
    return Wired(
        lambda m, x: m.b(torch.tanh(m.a(x) + m.p.value).flatten(1)),
        a=nn.Linear(4, 5),
        p=Embedded(T, 5),
        b=nn.Linear(T * 5, 3),
    )


def scaled() -> nn.Module:
    return Wired(lambda m, x: m.b((m.a(x) * m.p.value).mean(1)), a=nn.Linear(4, 5), p=Embedded(5), b=nn.Linear(5, 3))


def squared() -> nn.Module:
    """One node takes the parameter twice, and it is computed with before."""
    return Wired(
        lambda m, x: m.b((m.a(x) * (m.p.value * m.p.value).exp()).mean(1)),
        a=nn.Linear(4, 5),
        p=Embedded(5),
        b=nn.Linear(5, 3),
    )


def functional() -> nn.Module:
    return Wired(lambda m, x: m.b(torch.tanh(F.linear(x, m.p.value)).mean(1)), p=Embedded(5, 4), b=nn.Linear(5, 3))


def product() -> nn.Module:
    return Wired(lambda m, x: m.b(torch.tanh(torch.matmul(x, m.p.value)).mean(1)), p=Embedded(4, 5), b=nn.Linear(5, 3))


def from_left() -> nn.Module:
    return Wired(lambda m, x: m.b(torch.tanh(m.p.value @ x[:, 0].T).T), p=Embedded(5, 4), b=nn.Linear(5, 3))


def nothing_else() -> nn.Module:
    return Wired(lambda m, x: torch.tanh(torch.matmul(x, m.p.value)).mean(1), p=Embedded(4, 3))


def weight_norm() -> nn.Module:
    return Wired(
        lambda m, x: m.b(torch.tanh(m.a(x)).mean(1)), a=parametrizations.weight_norm(nn.Linear(4, 5)), b=nn.Linear(5, 3)
    )


def scaled_twice() -> nn.Module:
    """A factor with itself below, by way of elementwise functions and of a mixing one."""

    def wire(m: Any, x: Tensor) -> Tensor:
        h = torch.sin(m.a(x) * m.p.value)
        return m.b((h.cumsum(2) * m.p.value + m.p.value).mean(1))

    return Wired(wire, a=nn.Linear(4, 5), p=Embedded(5), b=nn.Linear(5, 3))


def affine() -> nn.Module:
    """Weight and bias are parts of one parameter."""
    return Wired(
        lambda m, x: m.b(torch.tanh(F.linear(x, m.p.value[:, :4], m.p.value[:, 4])).mean(1)),
        p=Embedded(5, 5),
        b=nn.Linear(5, 3),
    )


def positive() -> nn.Module:
    """A weight that is computed from the parameter and used twice in a row."""

    def wire(m: Any, x: Tensor) -> Tensor:
        w = F.softplus(m.p.value)
        return m.b(torch.tanh(F.linear(torch.tanh(F.linear(x, w)), w)).mean(1))

    return Wired(wire, p=Embedded(4, 4), b=nn.Linear(4, 3))


def attention_twice() -> nn.Module:
    def wire(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        for _ in range(2):
            h = h + m.attention(h, h, h, need_weights=False)[0]
        return h.mean(1)

    return Wired(wire, a=nn.Linear(4, 4), attention=nn.MultiheadAttention(4, 2, batch_first=True))


def layer_norm() -> nn.Module:
    return Wired(
        lambda m, x: m.b(m.norm(m.a(x)).flatten(1)), a=nn.Linear(4, 5), norm=nn.LayerNorm(5), b=nn.Linear(T * 5, 3)
    )


def tied_autoencoder() -> nn.Module:
    """A layer's weight used again by a function, transposed."""
    return Wired(
        lambda m, x: m.b(F.linear(torch.tanh(m.a(x)), m.a.weight.T).flatten(1)),
        a=nn.Linear(4, 5),
        b=nn.Linear(T * 4, 3),
    )


def sequence_first() -> nn.Module:
    def wire(m: Any, x: Tensor) -> Tensor:
        return m.b(m.act(m.a(x.transpose(0, 1)))).transpose(0, 1).mean(1)

    return Wired(wire, a=nn.Linear(4, 5), act=nn.Tanh(), b=nn.Linear(5, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "positions": positions,
    "scaled": scaled,
    "squared": squared,
    "functional": functional,
    "product": product,
    "from the left": from_left,
    "nothing else": nothing_else,
    "scaled twice": scaled_twice,
    "affine": affine,
    "positive": positive,
    "weight norm": weight_norm,
    "layer norm": layer_norm,
    "tied autoencoder": tied_autoencoder,
    "sequence first": sequence_first,
    "GPT": GPT,
    **{f"attention{' batch first' * b}": attention(b) for b in (False, True)},
    "attention without bias": attention(True, bias=False),
    "attention twice": attention_twice,
    **{f"cross attention{' batch first' * b}": cross(b) for b in (False, True)},
    "cross attention kdim": cross(True, kdim=3, vdim=3),
    **{f"encoder{' batch first' * b}{' norm first' * f}": encoder(b, f) for b in (False, True) for f in (False, True)},
    **{
        f"{kind.__name__}{' batch first' * b}": recurrent(kind, b)
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
        for b in (False, True)
    },
    "LSTM of two layers": recurrent(nn.LSTM, False, num_layers=2),
    "GRU both ways": recurrent(nn.GRU, True, bidirectional=True),
}


def built(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[name]().double()


def inputs(samples: int, positions: int = T) -> Tensor:
    return torch.randn(samples, positions, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def targets(name: str, x: Tensor) -> Tensor:
    with torch.no_grad():
        shape = built(name)(x).shape
    return torch.randint(shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(2))


@cache
def reference(name: str, samples: int, positions: int, reduction: str) -> Reference:
    x = inputs(samples, positions)
    losses = [contributions(nn.CrossEntropyLoss(reduction=reduction), targets(name, x))]
    with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
        return Reference(built(name), [x], losses)


def check(
    name: str, features: list[Any], agree: Agree, samples: int = N, positions: int = T, reduction: str = "mean"
) -> None:
    x = inputs(samples, positions)
    model, loss = extend(built(name)), extend(nn.CrossEntropyLoss(reduction=reduction))
    with backpack(*(feature() for feature in features)):
        loss(model(x), targets(name, x)).backward()
    wanted = reference(name, samples, positions, reduction)
    for feature in features:
        fields = {key: getattr(p, feature.field) for key, p in model.named_parameters()}
        agree(fields, {key: wanted.field(feature.__name__, key) for key in fields})


@pytest.mark.parametrize("name", NETWORKS)
def test_individual_quantities(name: str, agree: Agree) -> None:
    check(name, PULLED, agree)


@pytest.mark.parametrize("name", NETWORKS)
def test_first_order_alone(name: str, agree: Agree) -> None:
    """δ comes from the backward itself."""
    check(name, [BatchGrad], agree, reduction="sum")


@pytest.mark.parametrize("name", NETWORKS)
def test_one_sample(name: str, agree: Agree) -> None:
    check(name, PULLED, agree, samples=1)


@pytest.mark.parametrize("name", ["sequence first", "attention", "LSTM", "encoder", "GPT"])
def test_as_many_positions_as_samples(name: str, agree: Agree) -> None:
    """Shapes do not tell the batch: columns do."""
    if name != "GPT":
        check(name, PULLED, agree, samples=2, positions=2)
        check(name, PULLED, agree, samples=2, positions=4)


#: Where a layer or a nonlinear operation has other axes in front of the batch, which second derivatives want first.
MOVED = {"packed", "sequence first", "from the left", "attention", "cross attention", "encoder", "encoder norm first"}
HESSIANS = [DiagHessian, BatchDiagHessian]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("samples", [N, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_diagonals(name: str, samples: int, reduction: str, agree: Agree) -> None:
    if name in MOVED:
        if samples > 1:
            with pytest.raises(ValueError, match="batch"):
                check(name, HESSIANS, agree, samples, reduction=reduction)
        return
    check(name, HESSIANS, agree, samples, reduction=reduction)


@pytest.mark.parametrize("program", ["columns", "dense"])
@pytest.mark.parametrize("limit", [None, 2000])
@pytest.mark.parametrize(
    "name", ["functional", "squared", "scaled", "scaled twice", "affine", "cross attention batch first", "GRU"]
)
def test_hessian_diagonals_by_any_program(name: str, limit: int | None, program: str, agree: Agree) -> None:
    with satchel.settings(memory_limit=limit), forced(program):
        check(name, HESSIANS, agree)


# --- Kronecker factors of linear maps ----------------------------------------------------------------------------


class LinearMaps:
    """Every F.linear and torch.matmul with a part of a parameter: its input, the part, and a zero added to its output."""

    def __init__(self, parameters: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch):
        self.parameters = parameters
        self.uses: list[tuple[str, int, bool, Tensor, Tensor]] = []
        self.biases: list[tuple[str, int, Tensor]] = []
        linear, matmul = F.linear, torch.matmul
        monkeypatch.setattr(F, "linear", lambda x, w, b=None: self.use(linear(x, w, b), x, w, b, False))
        monkeypatch.setattr(torch, "matmul", lambda x, w: self.use(matmul(x, w), x, w, None, True))

    def use(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        probe = torch.zeros_like(out, requires_grad=True)
        name, start = self.find(weight)
        self.uses.append((name, start, transposed, x.detach(), probe))
        if bias is not None:
            self.biases.append((*self.find(bias), probe))
        return out + probe

    def find(self, part: Tensor) -> tuple[str, int]:
        """The parameter, and the first of its rows."""
        same = (part.untyped_storage().data_ptr(), part.storage_offset())
        for name, p in self.parameters.items():
            if p.untyped_storage().data_ptr() == same[0]:
                return name, same[1] // p.stride(0)
        raise AssertionError("no parameter")


def kronecker(
    name: str, x: Tensor, approximation: str, run: Callable[[Any, Tensor], Tensor]
) -> dict[str, list[Tensor]]:
    """[B, A] or [B] of every parameter; a use of a part has zero rows for the rest. Only the rows of a sample see its output."""
    model = built(name)
    wanted = reference(name, len(x), x.shape[1], "mean")
    with pytest.MonkeyPatch.context() as monkeypatch:
        maps = LinearMaps(dict(model.named_parameters()), monkeypatch)
        output = run(model, x)
    probes = [use[4] for use in maps.uses] + [probe for _, _, probe in maps.biases]
    flat = output.reshape(len(x), -1)
    cotangents = {id(p): t for p, t in zip(probes, jacobian(flat, probes), strict=True)}

    def factor(name: str, uses: list[tuple[int, Tensor]], axis: int) -> Tensor:
        columns = []
        for start, probe in uses:
            T = cotangents[id(probe)]
            T = T.reshape(*flat.shape, -1, T.shape[-1])
            total = model.get_parameter(name).shape[axis]
            columns.append(F.pad(T, (start, total - start - T.shape[-1])))
        T = torch.cat(columns, 2)
        T = T if approximation == "expand" else T.sum(2, keepdim=True)
        return torch.einsum("nfro,nfg,ngrq->oq", T, wanted.curvature, T)

    fields: dict[str, list[Tensor]] = {}
    for key in {use[0] for use in maps.uses}:
        uses = [use for use in maps.uses if use[0] == key]
        a = torch.cat([u[3].reshape(-1, u[3].shape[-1]) for u in uses])
        A = a.T @ a / (len(a) if approximation == "expand" else len(x))
        fields[key] = [factor(key, [(u[1], u[4]) for u in uses], 1 if uses[0][2] else 0), A]
    for key in {bias[0] for bias in maps.biases}:
        fields[key] = [factor(key, [bias[1:] for bias in maps.biases if bias[0] == key], 0)]
    return fields


def step_by_step(m: Any, x: Tensor) -> Tensor:
    """An LSTM of two layers, in functions."""
    h = x
    for k in range(2):
        cell, outputs = m.cell, []
        w, u, b, c = (getattr(cell, f"{what}_l{k}") for what in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        state = cells = torch.zeros(len(x), 3, dtype=x.dtype)
        for gates in F.linear(h, w, b).unbind(1):
            i, f, g, o = (gates + F.linear(state, u, c)).chunk(4, 1)
            cells = f.sigmoid() * cells + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cells.tanh()
            outputs.append(state)
        h = torch.stack(outputs, 1)
    return m.head(h[:, -1])


NETWORKS["LSTM of two layers, batch first"] = recurrent(nn.LSTM, True, num_layers=2)
LINEAR: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **{
        name: lambda m, x: m(x)
        for name in ("functional", "product", "nothing else", "sequence first", "attention", "attention batch first",
                     "attention without bias", "cross attention", "cross attention batch first", "cross attention kdim")
    },
    "LSTM of two layers, batch first": step_by_step,
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("approximation", ["expand", "backpack"])
@pytest.mark.parametrize("samples", [N, 1])
def test_kronecker_factors(name: str, approximation: str, samples: int, agree: Agree) -> None:
    x = inputs(samples)
    model, loss = extend(built(name)), extend(nn.CrossEntropyLoss())
    with backpack(KFLR(approximation=approximation)):
        loss(model(x), targets(name, x)).backward()
    wanted = kronecker(name, x, approximation, LINEAR[name])
    agree({key: p.kflr for key, p in model.named_parameters()}, wanted)


def test_functions_are_as_modules() -> None:
    """What is drawn, and the averaged curvature, of functional uses are those of the same network in modules."""
    x = inputs(N)
    twin = Wired(
        lambda m, x: m.b(torch.tanh(m.p(x)).mean(1)), p=nn.Linear(4, 5, bias=False), b=nn.Linear(5, 3)
    ).double()
    model = built("functional")
    with torch.no_grad():
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    for network in (extend(model), extend(twin)):
        generator = torch.Generator().manual_seed(3)
        with backpack(KFAC(mc_samples=2, generator=generator), DiagGGNMC(mc_samples=2, generator=generator), KFRA()):
            extend(nn.CrossEntropyLoss())(network(x), targets("functional", x)).backward()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(theirs.kfac, ours.kfac)
        torch.testing.assert_close(theirs.kfra, ours.kfra)
        torch.testing.assert_close(theirs.diag_ggn_mc, ours.diag_ggn_mc)
        torch.testing.assert_close(theirs.grad, ours.grad)


# --- around the uses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_modules_run_unfused(kind: Any, agree: Agree) -> None:
    """In float32 torch fuses them: extended, they compute the same to rounding, and leave the backend as it was."""
    torch.manual_seed(0)
    plain, before = kind(4, 3, num_layers=2, batch_first=True), torch.backends.mkldnn.enabled
    module, x = extend(copy.deepcopy(plain)), torch.randn(N, T, 4)
    torch.testing.assert_close(module(x)[0], plain(x)[0])
    with backpack(BatchGrad()):
        extend(nn.MSELoss())(module(x)[0], torch.zeros(N, T, 3)).backward()
    for p in module.parameters():
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)
    with pytest.raises(RuntimeError):
        module(torch.randn(N, T, 9))
    assert torch.backends.mkldnn.enabled == before
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), extend(module)):
        torch.testing.assert_close(copied(x)[0], plain(x)[0])
    with torch.no_grad():
        torch.testing.assert_close(module(x)[0], plain(x)[0], rtol=0, atol=0)


class Packed(nn.Module):
    """Samples of different lengths lie in no axis: individual pullbacks are right all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell, self.head = Embedded(4, 4), nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        lengths = [3, 3, 2, 1][: len(x)]
        h = nn.utils.rnn.pack_padded_sequence(x * self.a.value[0], torch.tensor(lengths), batch_first=True)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.cell(h)[0], batch_first=True)
        return self.head(h).mean(1)


NETWORKS["packed"] = Packed


def test_packed_sequence(agree: Agree) -> None:
    check("packed", PULLED, agree)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_on_parameters_alone(affine: bool) -> None:
    """No layer lies below that the columns could tell of."""
    model = Wired(
        lambda m, x: m.norm(torch.matmul(x[:, 0], m.p.value)), p=Embedded(4, 5), norm=nn.BatchNorm1d(5, affine=affine)
    )
    loss = extend(nn.MSELoss())
    extend(model.double())
    with pytest.raises((ValueError, NotImplementedError), match="GroupNorm"), backpack(BatchGrad()):
        loss(model(inputs(N)), torch.zeros(N, 5, dtype=torch.float64)).backward()


def test_instance_norm_keeps_samples(agree: Agree) -> None:
    check("instance norm", PULLED, agree)


NETWORKS["instance norm"] = lambda: Wired(
    lambda m, x: m.b(m.norm(m.a(x)).flatten(1)),
    a=nn.Linear(4, 5),
    norm=nn.InstanceNorm1d(T, affine=True),
    b=nn.Linear(T * 5, 3),
)


def test_sparse_embedding_is_refused() -> None:
    model = Wired(
        lambda m, x: m.b(m.e(x[:, 0, 0].long().abs() % 5)), e=nn.Embedding(5, 4, sparse=True), b=nn.Linear(4, 3)
    ).double()
    loss = extend(nn.MSELoss())
    extend(model)
    with pytest.raises(NotImplementedError, match="sparse"), backpack(BatchGrad()):
        loss(model(inputs(N)), torch.zeros(N, 3, dtype=torch.float64)).backward()


def test_costly_uses_are_named_once() -> None:
    def run() -> list[str]:
        model, loss = extend(Wired(lambda m, x: m.odd(x), odd=Odd()).double()), extend(nn.MSELoss())
        with warnings.catch_warnings(record=True) as caught, backpack(BatchGrad()):
            warnings.simplefilter("always")
            loss(model(inputs(N)), torch.zeros(N, T, 4, dtype=torch.float64)).backward()
        return [str(warning.message) for warning in caught if "every sample" in str(warning.message)]

    (message,), again = run(), run()
    assert "odd" in message and "gain" in message and "MulBackward0" in message
    assert not again


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_differentiable() -> None:
    """With create_graph=True individual gradients of uses by nodes are differentiable, too."""
    for name in ("scaled", "functional", "layer norm"):
        model, x = extend(built(name)), inputs(N)
        with backpack(BatchGrad()):
            extend(nn.CrossEntropyLoss())(model(x), targets(name, x)).backward(create_graph=True)
        p = next(p for key, p in model.named_parameters() if key.startswith(("p.", "norm.")))
        ours = torch.autograd.grad(p.grad_batch[1].square().sum(), p, retain_graph=True)[0]
        plain = built(name)
        q = dict(plain.named_parameters())[next(key for key, r in model.named_parameters() if r is p)]
        losses = F.cross_entropy(plain(x), targets(name, x), reduction="none").reshape(N, -1).sum(1) / N
        (g,) = torch.autograd.grad(losses[1], q, create_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(g.square().sum(), q)[0])


def test_hook_sees_the_fields() -> None:
    model, x, seen = extend(built("layer norm")), inputs(N), []
    loss = extend(nn.CrossEntropyLoss())
    with backpack(
        BatchGrad(), extension_hook=lambda m: seen.append((m, all(hasattr(p, "grad_batch") for p in m.parameters())))
    ):
        loss(model(x), targets("layer norm", x)).backward()
    assert [m for m, _ in seen] == [loss, model.b, model.norm, model.a] and all(complete for _, complete in seen)


def test_empty_batch() -> None:
    for name in ("scaled", "functional", "layer norm"):
        model, x = extend(built(name)), inputs(0)
        with backpack(BatchGrad(), SumGradSquared(), DiagGGNExact()):
            extend(nn.CrossEntropyLoss(reduction="sum"))(model(x), targets(name, x)).backward()
        for p in model.parameters():
            assert p.grad_batch.shape == (0, *p.shape) and not p.sum_grad_squared.any() and not p.diag_ggn_exact.any()


def test_model_that_returns_its_loss() -> None:
    """Where no tensor above a use tells samples apart, that is an error."""
    model = Wired(
        lambda m, x: F.linear(m.a(x), m.p.value).square().mean(), a=nn.Linear(4, 4), p=Embedded(5, 4)
    ).double()
    with pytest.raises(ValueError, match="batch"), backpack(BatchGrad()):
        extend(model)(inputs(N)).backward()


def test_nothing_stays_alive() -> None:
    """Nor needs the garbage collector."""
    model, x, loss = extend(built("GPT")), inputs(N), extend(nn.CrossEntropyLoss())
    y, counts = targets("GPT", x), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            with backpack(BatchGrad(), DiagGGNExact()):
                loss(model(x), y).backward()
            counts.append(tensors_alive())
    finally:
        gc.enable()
    assert counts[3] <= counts[1]


def test_chunks(agree: Agree) -> None:
    with satchel.settings(memory_limit=3000):
        for name in ("layer norm", "positions", "attention"):
            check(name, [BatchGrad, DiagGGNExact], agree)


def test_two_backwards_and_two_losses(agree: Agree) -> None:
    """A retained graph serves again; losses add."""
    model, x = extend(built("GPT")), inputs(N)
    loss = extend(nn.CrossEntropyLoss())
    value = loss(model(x), targets("GPT", x))
    for again in range(2):
        with backpack(DiagGGNExact(), BatchGrad()):
            (value + value if again else value).backward(retain_graph=True)
        wanted = reference("GPT", N, T, "mean")
        for feature in (DiagGGNExact, BatchGrad):
            fields = {key: getattr(p, feature.field) for key, p in model.named_parameters()}
            agree(fields, {key: (1 + again) * wanted.field(feature.__name__, key) for key in fields})


def test_averaged_curvature_of_any_operation_is_refused() -> None:
    model, x = extend(built("scaled")), inputs(N)
    with pytest.raises(NotImplementedError, match=r"p\.value.*KFRA"), backpack(KFRA()):
        extend(nn.CrossEntropyLoss())(model(x), targets("scaled", x)).backward()


def test_second_derivative_that_autograd_lacks_is_refused() -> None:
    """Of what computes a weight from a parameter."""
    model = Wired(lambda m, x: F.linear(x[:, 0], Sine.apply(m.p.value)), p=Embedded(5, 4), b=nn.Linear(4, 3)).double()
    loss, x = extend(nn.MSELoss()), inputs(N)
    with pytest.raises(NotImplementedError, match=r"p\.value.*DiagHessian"), backpack(DiagHessian()):
        loss(extend(model)(x), torch.zeros(N, 5, dtype=torch.float64)).backward()


def test_functional_loss(agree: Agree) -> None:
    """Without an extended loss the batch is the first axis of the last layer."""
    for name in ("layer norm", "GPT", "scaled"):
        model, x = extend(built(name)), inputs(N)
        with backpack(BatchGrad()):
            F.cross_entropy(model(x), targets(name, x)).backward()
        wanted = reference(name, N, T, "mean")
        agree(
            {k: p.grad_batch for k, p in model.named_parameters()}, {k: wanted.BatchGrad(k) for k in wanted.parameters}
        )


def test_flattened_loss(agree: Agree) -> None:
    """First order with positions flattened into the loss's batch: samples are those of the layers."""
    model, x = extend(built("GPT")), inputs(N)
    y = targets("GPT", x)
    with backpack(BatchGrad()):
        extend(nn.CrossEntropyLoss())(model(x).transpose(1, 2).flatten(0, 1), y.flatten()).backward()
    wanted = reference("GPT", N, T, "mean")
    agree({k: p.grad_batch for k, p in model.named_parameters()}, {k: wanted.BatchGrad(k) for k in wanted.parameters})


def test_node_of_unknown_axes_is_refused() -> None:
    """A definition's node must name the parameter's own indices."""
    from satchel_gen.definitions import DefinitionError, NodeCall
    from satchel_gen.definitions.layers.linear import LINEAR as definition
    from satchel_gen.definitions.layers.linear import i, n

    with pytest.raises(DefinitionError, match="weight"):
        dataclasses.replace(definition, nodes=(NodeCall("MmBackward0", "self", {"weight": (1, (i, n))}),))
