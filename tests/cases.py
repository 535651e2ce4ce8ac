"""What a test runs on: a network, its input and a loss; and how networks are put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Flatten, Linear, Sequential

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
