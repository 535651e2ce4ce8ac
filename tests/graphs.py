"""What tests of graphs share: a batch, and one comparison of a model's features with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cases import Wired
from conftest import Agree, comparable
from reference import Contributions, Reference
from satchel import backpack, extend
from satchel.extensions import (
    BatchGrad,
    BatchL2Grad,
    SumGradSquared,
    Variance,
)

FIRST_ORDER: list[Any] = [BatchGrad, BatchL2Grad, SumGradSquared, Variance]
x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
labels = torch.tensor([0, 2, 1, 1, 0])
values = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(build: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().double()


def check(
    agree: Agree,
    build: Callable[[], nn.Module],
    total: Callable[[Any], Tensor],
    losses: Sequence[Contributions],
    features: Sequence[Any],
    inputs: Tensor = x,
) -> Any:
    """total: outputs of the model → the loss; losses: the same as contributions of the samples, one per output."""
    model, reference = extend(built(build)), Reference(built(build), [inputs], losses)
    with backpack(*(feature() for feature in features)):
        total(model(inputs)).backward()
    for feature in features:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fields = {name: comparable(feature, getattr(p, feature.field)) for name, p in named.items()}
        agree(fields, {name: reference.field(feature.__name__, name) for name in fields})
    return model


def two_heads() -> nn.Module:
    def wire(m: Any, x: Tensor) -> Any:
        h = m.act(m.a(x))
        return m.classes(h), m.values(h)

    return Wired(wire, a=nn.Linear(4, 6), act=nn.Tanh(), classes=nn.Linear(6, 3), values=nn.Linear(6, 3))
