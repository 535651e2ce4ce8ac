"""Tiny networks, all extents different, one per way in which modules can be put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import GELU, Flatten, Identity, Linear, ReLU, Sequential, Sigmoid, Tanh

from reference import Reference, contributions


class Wired(nn.Module):
    """Modules by name, and a function that says how they are wired."""

    def __init__(self, wire: Callable[..., Any], **modules: nn.Module):
        super().__init__()
        self.wire = wire
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.wire(self, x)


def frozen(module: nn.Module, *names: str) -> nn.Module:
    """Parameters by name (all of them when none is given) stop requiring gradients."""
    for name, p in module.named_parameters():
        p.requires_grad_(p.requires_grad and bool(names) and name not in names)
    return module


def tied(first: Linear, second: Linear) -> dict[str, nn.Module]:
    second.weight = first.weight
    return {"a": first, "b": second}


@dataclass(frozen=True)
class Network:
    """``build`` is called under a fixed seed. ``shape`` of the input, batch first; ``permute`` leaves it non-contiguous.

    classes: the axis of the output that a classification loss takes for classes.
    below: the input is made of integers below it.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (5, 4)
    strided: bool = False
    classes: int = -1
    below: int | None = None

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.build()

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        if self.below is not None:
            return torch.randint(self.below, self.shape, generator=generator)
        if self.strided:
            return torch.randn(*self.shape[::-1], 2, generator=generator)[..., 0].permute(
                *reversed(range(len(self.shape)))
            )
        return torch.randn(self.shape, generator=generator)


def target_for(criterion: nn.Module, output: Tensor) -> Tensor:
    """A target for any output: the one thing that differs between the losses."""
    generator = torch.Generator().manual_seed(3)
    if isinstance(criterion, nn.CrossEntropyLoss):
        return torch.randint(output.shape[1], (len(output), *output.shape[2:]), generator=generator)
    if isinstance(criterion, nn.MSELoss):
        return torch.randn(output.shape, generator=generator)
    raise NotImplementedError(f"no targets for {type(criterion).__name__}: add them to target_for in {__file__}")


class Revealed(nn.Module):
    """network(x) + 0, with a parameter whose exact diagonal curvature shows S Sᵀ of every sample.

    The zero is onehot(n) @ Pᵀ @ mix, P = 0 [pairs, N]: entry (k, l), n of P moves outputs k and l of sample n together, so that
    its curvature is H_kk + H_ll + 2 H_kl. Whatever was drawn for the loss is thereby known, without knowing how.
    """

    mix: Tensor
    onehot: Tensor

    def __init__(self, network: nn.Module, x: Tensor):
        super().__init__()
        with torch.no_grad():
            self.shape = network(x).shape
        F = self.shape[1:].numel()
        self.rows, self.columns = torch.triu_indices(F, F)
        self.network = network
        self.probe = Linear(len(x), len(self.rows), bias=False)
        nn.init.zeros_(self.probe.weight)
        self.register_buffer("mix", torch.eye(F)[self.rows] + torch.eye(F)[self.columns])
        self.register_buffer("onehot", torch.eye(len(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) + (self.probe(self.onehot) @ self.mix).view(self.shape)

    def curvature(self, diagonal: Tensor) -> Tensor:
        """[pairs, N] on P → H [N, F, F]."""
        F = self.shape[1:].numel()
        pairs = diagonal.double().cpu().new_zeros(F, F, diagonal.shape[1])
        pairs[self.rows, self.columns] = pairs[self.columns, self.rows] = diagonal.double().cpu()
        own = pairs.diagonal().T / 4
        return ((pairs - own[:, None] - own[None]) / 2).permute(2, 0, 1)


@dataclass(frozen=True)
class Case:
    """A network with a loss at its output."""

    network: Network
    loss: type[nn.Module]
    reduction: str

    def criterion(self) -> nn.Module:
        return self.loss(reduction=self.reduction)

    def arranged(self, output: Tensor) -> Tensor:
        """As the loss takes it: classes are its second axis."""
        return output.movedim(self.network.classes, 1) if issubclass(self.loss, nn.CrossEntropyLoss) else output

    def target(self) -> Tensor:
        with torch.no_grad():
            return target_for(self.criterion(), self.arranged(self.network.model()(self.network.input())))

    def more(self) -> tuple[Tensor, ...]:
        """What the loss takes besides a target."""
        return ()

    def contributions(self, output: Tensor) -> Tensor:
        return contributions(self.criterion(), self.target(), more=self.more())(self.arranged(output))

    def unit(self) -> float:
        return self.network.shape[0] if self.reduction == "mean" else 1.0

    def reference(self) -> Reference:
        return _reference(self)


@cache
def _reference(case: Any) -> Reference:
    return Reference(case.network.model(), [case.network.input()], [case.contributions], case.unit())


def drawn(layer: type[nn.Module], example: Any) -> nn.Module:
    """A module as an example wants it; its own tensors are drawn, also where torch sets them."""
    module = layer(**example.arguments).train(example.training)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.3, 1.2)
    return module


def projection(module: nn.Module, example_input: Tensor) -> nn.Module:
    """All outputs of a module, whatever their shape, mixed into three: frozen, so that a reference need not differentiate by it."""
    with torch.no_grad():
        width = module(example_input).numel() // len(example_input)
    return Sequential(Flatten(), frozen(Linear(width, 3, bias=False)))


def around(name: str, layer: type[nn.Module], example: Any) -> Network:
    """A network around one layer: parameters above it and below it, and mixing."""
    shape, below = example.shape, example.below

    def build() -> nn.Module:
        module = drawn(layer, example)
        first: list[nn.Module] = [Linear(shape[-1], shape[-1])] if below is None else []
        zeros = torch.zeros(1, *shape, dtype=None if below is None else torch.long)
        return Sequential(*first, module, projection(module, zeros), Linear(3, 3))

    return Network(name, build, (4, *shape), below=below)


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
