"""What tests of lifetimes share: a model, and weak references to all that it computes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from satchel import extend

torch.manual_seed(0)
x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])


def network(inplace: bool = False) -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def extended() -> tuple[Any, Any]:
    return extend(network()), extend(nn.CrossEntropyLoss())


class Watch:
    """Weak references to the outputs of all modules, and to the batch."""

    def __init__(self, *modules: nn.Module) -> None:
        self.references: list[weakref.ref[Tensor]] = []
        for module in modules:
            for inner in module.modules():
                inner.register_forward_hook(lambda m, args, output: self.add(output))

    def add(self, tensor: Tensor) -> Tensor:
        self.references.append(weakref.ref(tensor))
        return None  # type: ignore[return-value]

    def alive(self) -> int:
        return sum(reference() is not None for reference in self.references)
