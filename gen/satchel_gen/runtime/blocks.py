"""Quantities that reduce individual pullbacks T [V, N, *p], in blocks of columns and samples that stay in cache.

The pullbacks are stored whole only where they are asked for; the same blocks serve every quantity that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from math import prod
from operator import add
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import moments
from .cost import block_shape, blocks
from .memory import empty, shared
from .precision import widened_dtype
from .rules import Reduction, registry
from .sums import summed_squares

#: Σ_{v,n} T, the gradient where T are individual ones.
SUM = "sum"
SUMMED = Reduction("per_sample", partial(torch.sum, dim=(0, 1)))


class _Total:
    """One quantity, block by block: the samples of a range of columns in order, then those of the next."""

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction
        self.parts: dict[int, Tensor] = {}

    def add(self, pullbacks: Tensor, signs: tuple[Tensor, ...], first: int) -> None:
        """`first`: the first sample of the block."""
        value = _applied(self.reduction, pullbacks, signs)
        key = first if self.reduction.over == "columns" else 0
        self.parts[key] = self.parts[key].add_(value) if key in self.parts else value

    @property
    def value(self) -> Tensor:
        parts = list(self.parts.values())
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Deviations:
    """Σ_{v,n} (T − mean_n T)². With d = T − K, K the mean of the n samples before a block of m, the block adds
    Σ d² − (Σ d)² / (n + m), and Σ d / (n + m) to the mean (West, 1979)."""

    def __init__(self) -> None:
        self.squares: Tensor | None = None
        self.means: list[Tensor] = []  # of one range of columns after the other
        self.count = 0

    def add(self, pullbacks: Tensor, signs: tuple[Tensor, ...], first: int) -> None:
        """`first`: the first sample of the block."""
        if first == 0:
            self.means.append(pullbacks.sum(1) / max(pullbacks.shape[1], 1))
        mean, self.count = self.means[-1], max(first + pullbacks.shape[1], 1)
        distances = pullbacks - mean[:, None]
        squares, drift = summed_squares(distances, 2), distances.sum(1)
        self.squares = squares if self.squares is None else self.squares.add_(squares)
        for column in drift:
            self.squares.addcmul_(column, column, value=-1 / self.count)
        mean.add_(drift, alpha=1 / self.count)

    @property
    def value(self) -> Tensor:
        assert self.squares is not None
        return self.squares.clamp_(min=0)  # where the samples agree, rounding leaves either sign

    @property
    def sum(self) -> Tensor:
        """Σ_{v,n} T."""
        return self.count * reduce(add, (mean.sum(0) for mean in self.means))


def in_blocks(
    pull: Callable[..., Tensor],
    reductions: Mapping[str, Reduction],
    factor: Tensor,
    operands: Sequence[Any],
    shape: tuple[int, ...],
    signs: Sequence[Tensor] = (),
    by_sample: int = 1,
    keep: Tensor | None = None,
    writes: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Several quantities of the same pullbacks; and these, if they are to be kept. Squared deviations by two moments, where these serve.

    pull: T of a factor [V, N, *output] and operands, the first `by_sample` of which are [N, …]; it takes `out` if it `writes`.
    shape: of one pullback. keep: the parameter that T [V, N, *shape] is a field of, if it is returned, too.
    """
    several = partial(_in_blocks, pull, factor=factor, operands=operands, shape=shape, signs=signs, by_sample=by_sample)
    seconds = {name: r.second for name, r in reductions.items() if r.second is not None and moments.serve(factor)}
    if not seconds:
        return several(reductions, keep=keep, writes=writes)
    taken = {name: reductions[name] for name in reductions if name not in seconds}
    for second in seconds.values():
        taken |= {second: registry().reductions[second], SUM: SUMMED}
    found, kept = several(taken, keep=keep, writes=writes)
    for name, second in seconds.items():
        value = moments.difference(found[second], found[SUM], factor.shape[1], spent=second not in reductions)
        found[name] = several({name: reductions[name]})[0][name] if value is None else value
    return {name: found[name] for name in reductions}, kept


def _in_blocks(
    pull: Callable[..., Tensor],
    reductions: Mapping[str, Reduction],
    factor: Tensor,
    operands: Sequence[Any],
    shape: tuple[int, ...],
    signs: Sequence[Tensor],
    by_sample: int,
    keep: Tensor | None = None,
    writes: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The same, squared deviations by their running mean."""
    V, N, *_ = factor.shape
    full = V, N, *shape
    writes = writes and not torch.is_grad_enabled()  # what is differentiated cannot be written to a place
    dtype = widened_dtype((factor, *operands))
    wide, long = block_shape(V, N, prod(shape), keep is not None)
    if wide >= V and long >= N:
        place = None
        if writes:
            place = shared(full, dtype, factor.device) if keep is None else empty(full, dtype, keep)
        pullbacks = _pulled(pull, factor, operands, place)
        return _reduced(reductions, pullbacks, signs), None if keep is None else pullbacks
    totals: dict[str, _Total | _Deviations] = {
        name: _Deviations() if reduction.over == "deviations" else _Total(reduction)
        for name, reduction in reductions.items()
    }
    deviations = next((total for total in totals.values() if isinstance(total, _Deviations)), None)
    if deviations is not None and SUM in totals:
        del totals[SUM]
    kept = None if keep is None else empty(full, dtype, keep)
    room = shared((wide, long, *shape), dtype, factor.device) if kept is None and writes else None
    for columns, samples in blocks(V, N, prod(shape), keep is not None):
        own = [*(some[samples] for some in operands[:by_sample]), *operands[by_sample:]]
        block = factor[columns, samples]
        place = None if kept is None else kept[columns, samples]
        spare = None if room is None else room[: len(block), : block.shape[1]]
        pullbacks = _pulled(pull, block, own, place if writes and place is not None else spare)
        own_signs = tuple([some[columns, samples] for some in signs])
        for total in totals.values():
            total.add(pullbacks, own_signs, samples.start)
        if place is not None and pullbacks.data_ptr() != place.data_ptr():
            place.copy_(pullbacks)
    found = {name: total.value for name, total in totals.items()}
    if deviations is not None and SUM in reductions:  # they have it
        found[SUM] = deviations.sum
    return found, kept


def _pulled(pull: Callable[..., Tensor], factor: Tensor, operands: Sequence[Any], place: Tensor | None) -> Tensor:
    return pull(factor, *operands) if place is None else pull(factor, *operands, out=place)


def _reduced(reductions: Mapping[str, Reduction], pullbacks: Tensor, signs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Several quantities of pullbacks that are there at once."""
    found: dict[str, Tensor] = {}
    for name, reduction in reductions.items():
        if reduction.over == "deviations":
            deviations = _Deviations()
            deviations.add(pullbacks, (), 0)
            found[name] = deviations.value
        else:
            found[name] = _applied(reduction, pullbacks, signs)
    return found


def _applied(reduction: Reduction, pullbacks: Tensor, signs: Sequence[Tensor]) -> Tensor:
    return reduction.function(pullbacks, *signs) if reduction.signed else reduction.function(pullbacks)


@dataclass(frozen=True)
class Blockwise:
    """The program of one quantity by blocks of individual pullbacks. writes: whether `pull` takes `out`."""

    #: What Python takes around the blocks, in operations: some 20 µs within a step, 8 where nothing else has used the caches.
    overhead: ClassVar[int] = 4
    pull: Callable[..., Tensor]
    reduction: Reduction
    shape: tuple[int, ...]
    writes: bool = False

    def __call__(self, factor: Tensor, *operands: Any) -> Tensor:
        signs, operands = operands[: self.reduction.signed], operands[self.reduction.signed :]
        found, _ = in_blocks(self.pull, {"": self.reduction}, factor, operands, self.shape, signs, writes=self.writes)
        return found[""]
