"""Tiny networks, all extents different, one per way in which modules can be put together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import GELU, Flatten, Identity, Linear, ReLU, Sequential, Sigmoid, Tanh

from cases import Network, Wired, frozen, tied

# --- wiring ------------------------------------------------------------------------------------------------------


def skip(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.a(x))
    return m.head(h + m.act(m.b(h)))


def double_skip(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h = h + m.sigmoid(m.b(m.act(h)))
    return m.head(m.act(h) + m.identity(h))


def branches(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.cat([m.act(m.a(x)), m.b(x), m.sigmoid(m.b(x.flip(1)))], 1))


def nested(m: Any, x: Tensor) -> Tensor:
    """Three values live at once, one of them twice."""
    h = m.act(m.a(x))
    p, q = m.b(h), m.act(m.c(h))
    return m.head(m.act(p + q) - 0.5 * q) + p[:, :3]


def siamese(m: Any, x: Tensor) -> Tensor:
    return m.head(m.act(m.a(x[:, 0])) - m.act(m.a(x[:, 1])))


def siamese_distant(m: Any, x: Tensor) -> Tensor:
    """The two uses have different numbers of positions."""
    return m.head(m.act(m.a(x)).mean(1) + m.act(m.a(x[:, 0])))


def recurrent(m: Any, x: Tensor) -> Tensor:
    return m.head(m.act(m.a(m.act(m.a(x)))))


def linear_recurrent(m: Any, x: Tensor) -> Tensor:
    return m.a(m.a(x))


def tied_parallel(m: Any, x: Tensor) -> Tensor:
    return m.head(m.act(m.a(x)) + m.sigmoid(m.b(x)))


def tied_sequential(m: Any, x: Tensor) -> Tensor:
    return m.head(m.act(m.b(m.act(m.a(x)))))


def autoencoder_like(m: Any, x: Tensor) -> Tensor:
    """One tensor is the weight of two modules in a row, without anything between them."""
    return m.head(m.b(m.a(x)))


def functional(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.a(x)).view(-1, 2, 3)
    h = torch.cat([h.permute(0, 2, 1), 0.5 * h.transpose(1, 2).flip(2)], 2)[:, 1:]
    h = h.reshape(-1, 8) - torch.stack([h.sum(2), h.mean(2)], 1).repeat(1, 1, 2).flatten(1)
    return m.head(-h / 3)


def broadcast(m: Any, x: Tensor) -> Tensor:
    """A small operand is stretched over positions by an addition and by expand."""
    h = m.act(m.a(x))
    return m.head(h + m.b(x.mean(1, keepdim=True)) + m.c(x[:, :1]).expand_as(h) + 1.5)


def split(m: Any, x: Tensor) -> Tensor:
    halves = m.act(m.a(x)).chunk(2, 1)
    return m.head(halves[0] - 2 * halves[1])


def rows(m: Any, x: Tensor) -> Tensor:
    """Positions and samples as rows of one matrix."""
    return m.head(m.act(m.a(x.flatten(0, 1)))).unflatten(0, x.shape[:2])


def positions_first(m: Any, x: Tensor) -> Tensor:
    return m.head(m.act(m.a(x.transpose(0, 1)))).transpose(0, 1)


def mean_pool(m: Any, x: Tensor) -> Tensor:
    return m.head(m.act(m.a(x)).mean(1))


def activations(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.sin(m.b(F.gelu(m.a(x)))).softmax(1))


def gated(m: Any, x: Tensor) -> Tensor:
    """The product of two branches: linear in each, not in both."""
    return m.head(m.a(x) * m.sigmoid(m.b(x)))


def attention(m: Any, x: Tensor) -> Tensor:
    weights = (m.q(x) @ m.k(x).transpose(1, 2) / 2).softmax(2)
    return m.head(x + weights @ m.v(x))


def normalised(m: Any, x: Tensor) -> Tensor:
    return m.head(F.layer_norm(m.a(x), (6,)).clamp(min=-1.0))


NETWORKS = (
    Network("linear", lambda: Linear(4, 3)),
    Network("bias_free_linear", lambda: Linear(4, 3, bias=False)),
    Network("relu", lambda: Sequential(Linear(4, 6), ReLU(), Linear(6, 3))),
    Network("sigmoid_tanh", lambda: Sequential(Linear(4, 6), Sigmoid(), Linear(6, 2), Tanh(), Linear(2, 3))),
    Network("linear_linear", lambda: Sequential(Linear(4, 6), Linear(6, 3))),
    Network("tanh_relu_sigmoid", lambda: Sequential(Linear(4, 6), Tanh(), ReLU(), Linear(6, 3), Sigmoid())),
    Network(
        "stacked_activations", lambda: Sequential(Linear(4, 6), Sigmoid(), Tanh(), Linear(6, 2), Tanh(), Sigmoid())
    ),
    Network("activation_first", lambda: Sequential(Tanh(), Linear(4, 6), ReLU(), Identity(), Linear(6, 3))),
    Network("bias_free", lambda: Sequential(Linear(4, 6, bias=False), ReLU(), Linear(6, 3, bias=False))),
    Network("one_feature", lambda: Sequential(Linear(1, 1), Tanh(), Linear(1, 2)), (5, 1)),
    Network("one_sample", lambda: Sequential(Linear(4, 6), Tanh(), Linear(6, 3)), (1, 4)),
    Network("strided", lambda: Sequential(Linear(4, 6), ReLU(), Linear(6, 3)), strided=True),
    Network("sequence", lambda: Sequential(Linear(4, 6), ReLU(), Linear(6, 3)), (5, 2, 4)),
    Network("sequence_bias_free", lambda: Sequential(Linear(4, 6, bias=False), Tanh(), Linear(6, 3, False)), (5, 2, 4)),
    Network("one_position", lambda: Sequential(Linear(4, 6), Sigmoid(), Linear(6, 3)), (5, 1, 4)),
    Network("one_sample_sequence", lambda: Sequential(Linear(4, 6), Tanh(), Linear(6, 3)), (1, 2, 4)),
    Network("grid", lambda: Sequential(Linear(5, 6), Tanh(), Linear(6, 4)), (3, 2, 4, 5)),
    Network("strided_sequence", lambda: Sequential(Linear(4, 6), Tanh(), Linear(6, 3)), (5, 2, 4), strided=True),
    Network(
        "long_sequence",
        lambda: Sequential(Linear(2, 3), Tanh(), Wired(mean_pool, a=Linear(3, 2), act=ReLU(), head=Linear(2, 4))),
        (3, 11, 2),
    ),
    Network(
        "classes_first",
        lambda: Wired(lambda m, x: m.b(m.act(m.a(x))).permute(0, 2, 1), a=Linear(4, 6), act=ReLU(), b=Linear(6, 3)),
        (5, 2, 4),
        classes=1,
    ),
    Network("positions_are_classes", lambda: Sequential(Linear(4, 6), Tanh(), Linear(6, 3)), (5, 2, 4), classes=1),
    Network(
        "flatten",
        lambda: Sequential(Linear(3, 4), Sigmoid(), Flatten(), Linear(8, 6), ReLU(), Identity(), Linear(6, 5)),
        (7, 2, 3),
    ),
    Network("flatten_first", lambda: Sequential(Flatten(), Linear(6, 4), Tanh(), Flatten(), Linear(4, 5)), (7, 2, 3)),
    Network("flatten_some", lambda: Sequential(Linear(3, 4), Flatten(1, 2), Tanh(), Linear(4, 2)), (5, 2, 3, 3)),
    Network("inplace", lambda: Sequential(Linear(4, 6), ReLU(inplace=True), Linear(6, 3))),
    Network("inplace_bias_free", lambda: Sequential(Linear(4, 6, bias=False), ReLU(inplace=True), Linear(6, 3))),
    Network("inplace_sequence", lambda: Sequential(Linear(4, 6), ReLU(inplace=True), Linear(6, 3)), (5, 2, 4)),
    Network(
        "inplace_sequence_bias_free", lambda: Sequential(Linear(4, 6, bias=False), ReLU(True), Linear(6, 3)), (5, 2, 4)
    ),
    Network(
        "inplace_after_flatten",
        lambda: Sequential(Linear(3, 4), Flatten(), ReLU(inplace=True), Linear(8, 5)),
        (7, 2, 3),
    ),
    Network(
        "inplace_after_identity",
        lambda: Sequential(Linear(3, 4), Identity(), ReLU(inplace=True), Linear(4, 5)),
        (7, 2, 3),
    ),
    Network("inplace_last", lambda: Sequential(Linear(4, 6), Tanh(), Linear(6, 3), ReLU(inplace=True)), (5, 2, 4)),
    Network("frozen_first", lambda: Sequential(frozen(Linear(4, 6)), Tanh(), Linear(6, 3))),
    Network("frozen_middle", lambda: Sequential(Linear(4, 6), Tanh(), frozen(Linear(6, 2)), Tanh(), Linear(2, 3))),
    Network("frozen_last", lambda: Sequential(Linear(4, 6), Sigmoid(), frozen(Linear(6, 3)))),
    Network("frozen_some", lambda: Sequential(frozen(Linear(4, 6), "weight"), Tanh(), frozen(Linear(6, 3), "bias"))),
    Network("skip", lambda: Wired(skip, a=Linear(4, 6), act=Tanh(), b=Linear(6, 6), head=Linear(6, 3))),
    Network(
        "skip_relu", lambda: Wired(skip, a=Linear(4, 6), act=ReLU(), b=Linear(6, 6, bias=False), head=Linear(6, 3))
    ),
    Network(
        "skip_sequence",
        lambda: Wired(skip, a=Linear(4, 6), act=Sigmoid(), b=Linear(6, 6), head=Linear(6, 3)),
        (5, 2, 4),
    ),
    Network(
        "double_skip",
        lambda: Wired(
            double_skip,
            a=Linear(4, 6),
            act=Tanh(),
            sigmoid=Sigmoid(),
            b=Linear(6, 6),
            identity=Identity(),
            head=Linear(6, 3),
        ),
    ),
    Network(
        "branches",
        lambda: Wired(branches, a=Linear(4, 6), act=Tanh(), sigmoid=Sigmoid(), b=Linear(4, 2), head=Linear(10, 3)),
    ),
    Network(
        "nested", lambda: Wired(nested, a=Linear(4, 6), act=Tanh(), b=Linear(6, 7), c=Linear(6, 7), head=Linear(7, 3))
    ),
    Network("siamese", lambda: Wired(siamese, a=Linear(4, 6), act=Tanh(), head=Linear(6, 3)), (5, 2, 4)),
    Network(
        "siamese_distant", lambda: Wired(siamese_distant, a=Linear(4, 6), act=Sigmoid(), head=Linear(6, 3)), (5, 2, 4)
    ),
    Network("recurrent", lambda: Wired(recurrent, a=Linear(4, 4), act=Tanh(), head=Linear(4, 3))),
    Network(
        "recurrent_relu",
        lambda: Wired(recurrent, a=Linear(4, 4), act=ReLU(), head=Linear(4, 3)),
        (5, 2, 4),
    ),
    Network("linear_recurrent", lambda: Wired(linear_recurrent, a=Linear(4, 4))),
    Network(
        "tied_parallel",
        lambda: Wired(
            tied_parallel, **tied(Linear(4, 6), Linear(4, 6)), act=Tanh(), sigmoid=Sigmoid(), head=Linear(6, 3)
        ),
    ),
    Network(
        "tied_sequential",
        lambda: Wired(tied_sequential, **tied(Linear(4, 4), Linear(4, 4, bias=False)), act=Tanh(), head=Linear(4, 3)),
    ),
    Network(
        "tied_in_a_row",
        lambda: Wired(autoencoder_like, **tied(Linear(4, 4), Linear(4, 4)), head=Linear(4, 3)),
        (5, 2, 4),
    ),
    Network("functional", lambda: Wired(functional, a=Linear(4, 6), act=Tanh(), head=Linear(8, 3))),
    Network(
        "broadcast",
        lambda: Wired(broadcast, a=Linear(4, 6), act=Tanh(), b=Linear(4, 6), c=Linear(4, 6), head=Linear(6, 3)),
        (5, 2, 4),
    ),
    Network("split", lambda: Wired(split, a=Linear(4, 6), act=Tanh(), head=Linear(3, 2))),
    Network("mean_pool", lambda: Wired(mean_pool, a=Linear(4, 6), act=Sigmoid(), head=Linear(6, 3)), (5, 2, 4)),
    Network("gelu", lambda: Sequential(Linear(4, 6), GELU(), Linear(6, 3))),
    Network(
        "activations",
        lambda: Wired(activations, a=Linear(4, 6), b=Linear(6, 2), head=Linear(2, 3)),
    ),
    Network(
        "gated",
        lambda: Wired(gated, a=Linear(4, 6), b=Linear(4, 6), sigmoid=Sigmoid(), head=Linear(6, 3)),
    ),
    Network(
        "attention",
        lambda: Wired(attention, q=Linear(4, 6), k=Linear(4, 6), v=Linear(4, 4), head=Linear(4, 3)),
        (5, 2, 4),
    ),
    Network("normalised", lambda: Wired(normalised, a=Linear(4, 6), head=Linear(6, 3))),
)
#: Layers whose batch is not their first axis: what needs second derivatives of the layers refuses these.
MOVED = (
    Network("rows", lambda: Wired(rows, a=Linear(4, 6), act=Tanh(), head=Linear(6, 3)), (5, 2, 4)),
    Network(
        "positions_first", lambda: Wired(positions_first, a=Linear(4, 6), act=Tanh(), head=Linear(6, 3)), (5, 2, 4)
    ),
)
