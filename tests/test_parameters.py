"""Parameters that no layer with a definition uses, and batches that are not the first axis: attention, recurrence, tied weights.

Every network is compared with dense plain autograd on the same modules.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import satchel
from cases import Wired
from conftest import Agree, as_if_large
from parameters import MOVED, NETWORKS, PULLED, Embedded, N, T, built, check, inputs, reference, targets
from satchel import backpack, extend
from satchel.extensions import KFLR, KFRA, BatchDiagHessian, BatchGrad, DiagGGNExact, DiagHessian, SumGradSquared
from satchel.runtime.cost import forced
from test_lifetime import tensors_alive


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


@pytest.mark.parametrize("name", NETWORKS)
def test_individual_quantities(name: str, agree: Agree) -> None:
    check(name, PULLED, agree)


@pytest.mark.parametrize("name", NETWORKS)
def test_first_order_alone(name: str, agree: Agree) -> None:
    """δ comes from the backward itself."""
    check(name, [BatchGrad], agree, reduction="sum")


@pytest.mark.filterwarnings("error:An output with one or more elements was resized")
@pytest.mark.parametrize("features", [PULLED, [BatchGrad]], ids=["together", "alone"])
@pytest.mark.parametrize("name", NETWORKS)
def test_in_blocks(name: str, features: list[Any], monkeypatch: pytest.MonkeyPatch, agree: Agree) -> None:
    """As large parameters are: a sample at a time, each pullback written to its place."""
    as_if_large(monkeypatch, cache_elements=1)
    check(name, features, agree)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_sample(name: str, agree: Agree) -> None:
    check(name, PULLED, agree, samples=1)


@pytest.mark.parametrize("name", ["sequence first", "attention", "LSTM", "encoder", "GPT"])
def test_as_many_positions_as_samples(name: str, agree: Agree) -> None:
    """Shapes do not tell the batch: columns do."""
    if name != "GPT":
        check(name, PULLED, agree, samples=2, positions=2)
        check(name, PULLED, agree, samples=2, positions=4)


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
    "name",
    ["functional", "squared", "scaled", "scaled twice", "scaled again", "affine", "cross attention batch first", "GRU"],
)
def test_hessian_diagonals_by_any_program(name: str, limit: int | None, program: str, agree: Agree) -> None:
    with satchel.settings(memory_limit=limit), forced(program):
        check(name, HESSIANS, agree)


@pytest.mark.parametrize("name", ["positions", "scaled", "scaled twice", "squared"])
def test_exact_block(name: str, agree: Agree) -> None:
    """Where no definition gives a structure, the curvature itself, of the sum over uses."""
    x = inputs(N)
    model, loss = extend(built(name)), extend(nn.CrossEntropyLoss())
    with backpack(KFLR()):
        loss(model(x), targets(name, x)).backward()
    wanted = reference(name, N, T, "mean").SqrtGGNExact("p.value").sum(0)
    agree({"p.value": model.p.value.kflr}, {"p.value": [wanted]})


@pytest.mark.parametrize("name", ["scaled", "squared"])
def test_averaged_curvature_of_any_operation(name: str, agree: Agree) -> None:
    """Of what is linear from there on, 1/N Σ_n J_nᵀ Ḡ J_n of the outputs' Ḡ = Σ_n ∇²ℓ_n."""
    x = inputs(N)
    model, loss = extend(built(name)), extend(nn.CrossEntropyLoss())
    with backpack(KFRA()):
        loss(model(x), targets(name, x)).backward()
    plain = built(name)
    J = torch.autograd.functional.jacobian(
        lambda p: torch.func.functional_call(plain, {"p.value": p}, x), plain.p.value
    )
    H = torch.autograd.functional.hessian(lambda f: F.cross_entropy(f, targets(name, x)), plain(x).detach())
    wanted = torch.einsum("nfp,fg,ngq->pq", J, H.diagonal(dim1=0, dim2=2).sum(-1), J) / N
    agree({"p.value": model.p.value.kfra}, {"p.value": [wanted]})


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
