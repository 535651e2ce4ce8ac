"""Networks with parameters that no layer with a definition uses, or whose batch is not the first axis, beside dense autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from cases import Wired
from conftest import Agree
from reference import Reference, contributions
from satchel import backpack, extend
from satchel.extensions import BatchGrad, BatchL2Grad, DiagGGNExact, SumGradSquared, Variance

N, T, D = 4, 3, 6
#: Features that need no more of a parameter than its individual pullbacks.
PULLED: list[Any] = [BatchGrad, BatchL2Grad, SumGradSquared, Variance, DiagGGNExact]


class Embedded(nn.Module):
    """A parameter that is added, or multiplied."""

    def __init__(self, *shape: int):
        super().__init__()
        self.value = nn.Parameter(torch.randn(shape))


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


def scaled_twice() -> nn.Module:
    """Before and after the positions are gone."""
    return Wired(
        lambda m, x: m.b(torch.tanh((m.a(x) * m.p.value).mean(1)) * m.p.value),
        a=nn.Linear(4, 5),
        p=Embedded(5),
        b=nn.Linear(5, 3),
    )


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


def scaled_again() -> nn.Module:
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


def instance_norm() -> nn.Module:
    return Wired(
        lambda m, x: m.b(m.norm(m.a(x)).flatten(1)),
        a=nn.Linear(4, 5),
        norm=nn.InstanceNorm1d(T, affine=True),
        b=nn.Linear(T * 5, 3),
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


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "positions": positions,
    "scaled": scaled,
    "scaled twice": scaled_twice,
    "squared": squared,
    "functional": functional,
    "product": product,
    "from the left": from_left,
    "nothing else": nothing_else,
    "scaled again": scaled_again,
    "affine": affine,
    "positive": positive,
    "weight norm": weight_norm,
    "layer norm": layer_norm,
    "tied autoencoder": tied_autoencoder,
    "instance norm": instance_norm,
    "sequence first": sequence_first,
    "packed": Packed,
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
    **{f"LSTM of two layers{', batch first' * b}": recurrent(nn.LSTM, b, num_layers=2) for b in (False, True)},
    "GRU both ways": recurrent(nn.GRU, True, bidirectional=True),
}

#: Where a layer or a nonlinear operation has other axes in front of the batch, which second derivatives want first.
MOVED = {"packed", "sequence first", "from the left", "attention", "cross attention", "encoder", "encoder norm first"}


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
