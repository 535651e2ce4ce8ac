"""Quantities that reduce individual pullbacks T [V, N, *p], in blocks of columns and samples that stay in cache.

The pullbacks are stored whole only where they are asked for; the same blocks serve every quantity that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cost import blocks
from .memory import empty
from .rules import Reduction


class _Total:
    """One quantity, block by block: the samples of a range of columns in order, then those of the next."""

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction
        self.parts: dict[int, Tensor] = {}
        self.count = 0
        self.mean: Tensor | None = None

    def add(self, pullbacks: Tensor, signs: tuple[Tensor, ...], first: int) -> None:
        """`first`: the first sample of the block."""
        over = self.reduction.over
        if over == "deviations":
            value = self._merged(pullbacks, first)
        else:
            value = self.reduction.function(pullbacks, *(signs if self.reduction.signed else ()))
        key = first if over == "columns" else 0
        self.parts[key] = self.parts[key].add_(value) if key in self.parts else value

    def _merged(self, pullbacks: Tensor, first: int) -> Tensor:
        """What a block adds to the squared deviations (Chan, Golub and LeVeque, 1979, eq. 2.1)."""
        count, mean = pullbacks.shape[1], pullbacks.mean(1)
        value = self.reduction.function(pullbacks) if count > 1 else torch.zeros_like(mean[0])
        if first == 0 or self.mean is None:
            self.count, self.mean = count, mean
            return value
        total, distance = self.count + count, mean - self.mean
        value = value + distance.square().sum(0) * (self.count * count / total)
        self.count, self.mean = total, self.mean + distance * (count / total)
        return value

    @property
    def value(self) -> Tensor:
        parts = list(self.parts.values())
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def in_blocks(
    pull: Callable[..., Tensor],
    reductions: Mapping[str, Reduction],
    factor: Tensor,
    operands: Sequence[Any],
    each: int,
    signs: Sequence[Tensor] = (),
    by_sample: int = 1,
    keep: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Several quantities of the same pullbacks; and these, if they are to be kept.

    pull: T of a factor [V, N, *output] and operands, the first `by_sample` of which are [N, …]. each: elements of one pullback.
    """
    V, N = factor.shape[:2]
    totals = {name: _Total(reduction) for name, reduction in reductions.items()}
    kept: Tensor | None = None
    for columns, samples in blocks(V, N, each):
        own = [operand[samples] for operand in operands[:by_sample]]
        pullbacks = pull(factor[columns, samples], *own, *operands[by_sample:])
        for total in totals.values():
            total.add(pullbacks, tuple(some[columns, samples] for some in signs), samples.start)
        if keep:
            kept = empty((V, N, *pullbacks.shape[2:]), like=pullbacks) if kept is None else kept
            kept[columns, samples] = pullbacks
    return {name: total.value for name, total in totals.items()}, kept


@dataclass(frozen=True)
class Blockwise:
    """The program of one quantity by blocks of individual pullbacks."""

    pull: Callable[..., Tensor]
    reduction: Reduction
    each: int

    def __call__(self, factor: Tensor, *operands: Any) -> Tensor:
        signs, operands = operands[: self.reduction.signed], operands[self.reduction.signed :]
        found, _ = in_blocks(self.pull, {"": self.reduction}, factor, operands, self.each, signs)
        return found[""]
