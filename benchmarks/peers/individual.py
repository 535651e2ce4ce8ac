"""Features that follow from individual gradients, for implementations that offer nothing else."""

from __future__ import annotations

from typing import Any

from torch import Tensor

FIRST_ORDER = frozenset({"BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"})


def reductions(gradients: list[Tensor], features: tuple[str, ...]) -> dict[str, list[Any]]:
    """Of [N, *parameter] for each parameter, those of the features that are first order."""
    return {name: [_REDUCE[name](g) for g in gradients] for name in features if name in FIRST_ORDER}


_REDUCE = {
    "BatchGrad": lambda g: g,
    "BatchL2Grad": lambda g: g.flatten(1).square().sum(1),
    "SumGradSquared": lambda g: g.square().sum(0),
    "Variance": lambda g: g.var(0, correction=0),
}
