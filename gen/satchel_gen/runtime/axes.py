"""Named axes. A starred one stands for any number of axes, zero included; in canonical tensors it is flattened to one.

Joined axes, ("g", "c"), are one axis of the tensor as torch stores it and two of the canonical one. The canonical batch is first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from torch import Tensor

Axes: TypeAlias = tuple[str | tuple[str, ...], ...]

_NONE: Mapping[str, int] = MappingProxyType({})


def canonical_shape(
    axes: Axes, shape: Sequence[int], extents: Mapping[str, int] = _NONE, ranks: Mapping[str, int] = _NONE
) -> tuple[int, ...] | None:
    """`shape` with starred axes flattened and joined ones apart; None if it cannot fit `axes`.

    `extents` are those of the first of joined axes, `ranks` the numbers of axes of starred ones; one may be left to fit.
    """
    free = len(shape) - sum(ranks.get(_bare(axis), 0) if _is_starred(axis) else 1 for axis in axes)
    if free < 0 or (free and all(not _is_starred(axis) or _bare(axis) in ranks for axis in axes)):
        return None
    found: list[int] = []
    rest = list(shape)
    for axis in axes:
        rank = (ranks.get(_bare(axis), free)) if _is_starred(axis) else 1
        extent, rest = prod(rest[:rank]), rest[rank:]
        if isinstance(axis, str):
            found.append(extent)
            continue
        first = extents[axis[0]]
        if first < 1 or extent % first:
            return None
        found += [first, extent // first]
    return tuple(found)


def _is_starred(axis: str | tuple[str, ...]) -> bool:
    return isinstance(axis, str) and axis.endswith("*")


def _bare(axis: str | tuple[str, ...]) -> str:
    return axis.rstrip("*") if isinstance(axis, str) else ""


@cache
def names(axes: Axes) -> tuple[str, ...]:
    """The canonical axes."""
    return tuple(name for axis in axes for name in (axis if isinstance(axis, tuple) else (axis,)))


@cache
def starred(axes: Axes) -> int | None:
    """Canonical position of the first starred axis."""
    return next((position for position, axis in enumerate(names(axes)) if axis.endswith("*")), None)


def canonical(tensor: Tensor, axes: Axes, lead: int = 0) -> Tensor:
    """`tensor` [*lead, *shape] with the starred axis of `shape` flattened; `lead` counts the axes in front that have no name."""
    shape = Layout.of(axes).canonical_shape(tensor.shape[lead:])
    assert shape is not None, f"a tensor of shape {tuple(tensor.shape)} has no axes {axes}"
    return tensor.reshape(*tensor.shape[:lead], *shape)


@lru_cache(maxsize=1 << 12)
def extents(axes: Axes, shape: tuple[int, ...]) -> Mapping[str, int]:
    """Extent by axis name, without the star, of a canonical shape."""
    found = {axis.rstrip("*"): extent for axis, extent in zip(names(axes), shape, strict=True)}
    return MappingProxyType(found)


@dataclass(frozen=True, eq=False)
class Layout:
    """The axes of a tensor, with what is known of them: `extents` of the first of joined ones, `ranks` of starred ones."""

    axes: Axes
    extents: Mapping[str, int]
    ranks: Mapping[str, int]

    @staticmethod
    @cache
    def of(axes: Axes, extents: tuple[tuple[str, int], ...] = (), ranks: tuple[tuple[str, int], ...] = ()) -> Layout:
        """The one layout that says this."""
        return Layout(axes, dict(extents), dict(ranks))

    @lru_cache(maxsize=1 << 12)  # noqa: B019 (a layout is there for good)
    def canonical_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Canonical shape of a tensor whose first axis is the batch; None if it does not fit."""
        return canonical_shape(self.axes, shape, self.extents, self.ranks)

    def rows(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The axes among which the batch can be: the first, and the starred ones if they are next to it."""
        return tuple(shape[: max(1, len(shape) - self._trailing)] if self.movable else shape[:1])

    @property
    def movable(self) -> bool:
        """Whether a starred axis is next to the batch."""
        return len(self.axes) > 1 and _is_starred(self.axes[1])

    @property
    def _trailing(self) -> int:
        """How many axes of the tensor stand after those."""
        return sum(self.ranks.get(_bare(axis), 0) if _is_starred(axis) else 1 for axis in self.axes[2:])

    def behind(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Canonical shape of the axes that stand after the rows."""
        return canonical_shape(self.axes[2:], shape, self.extents, self.ranks)


class Batch(NamedTuple):
    """Which sample an element of a tensor belongs to: flattened, the tensor is [outer, samples, inner].

    outer = 1 where the batch is the first axis, alone or joined with positions; a sequence-first tensor [T, N, …] has outer = T.
    """

    samples: int
    outer: int = 1

    def fits(self, shape: Sequence[int]) -> bool:
        return self.samples == 1 or self in possible_batches(tuple(shape), self.samples)

    @lru_cache(maxsize=1 << 12)  # noqa: B019 (a batch is a value)
    def canonical_shape(self, layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """`shape` with the batch in front and starred axes flattened; None if it cannot fit `layout`."""
        if self.is_first(shape):
            return layout.canonical_shape(shape)
        those = layout.rows(shape)
        behind = layout.behind(shape[len(those) :])
        if not layout.movable or behind is None or not self.samples or not self.fits(those):
            return None
        return (self.samples, prod(those) // self.samples, *behind)

    def to_front(self, tensor: Tensor, layout: Layout, lead: int = 0) -> Tensor:
        """`tensor` [*lead, *shape] as [*lead, *canonical]."""
        before, own = tensor.shape[:lead], tensor.shape[lead:]
        shape = self.canonical_shape(layout, own)
        assert shape is not None, f"a tensor of shape {tuple(tensor.shape)} has no batch {self}"
        if self.is_first(own):
            return tensor if shape == own else tensor.reshape(*before, *shape)
        split = tensor.reshape(*before, self.outer, self.samples, shape[1] // self.outer, *shape[2:])
        return split.movedim(lead, lead + 1).reshape(*before, *shape)

    def to_place(self, tensor: Tensor, shape: Sequence[int], lead: int = 0) -> Tensor:
        """Inverse of `to_front`."""
        before = tensor.shape[:lead]
        if self.is_first(shape):
            return tensor if tensor.shape[lead:] == shape else tensor.reshape(*before, *shape)
        split = tensor.reshape(*before, self.samples, self.outer, -1, *tensor.shape[lead + 2 :])
        return split.movedim(lead, lead + 1).reshape(*before, *shape)

    @lru_cache(maxsize=1 << 12)  # noqa: B019 (a batch is a value)
    def placed(self, layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Canonical shape of a layer's tensor; None where the batch cannot be where this says."""
        found = self.canonical_shape(layout, shape)
        return found if found is not None and possible_batches(layout.rows(shape), self.samples) else None

    def is_first(self, shape: Sequence[int]) -> bool:
        """Whether the batch is the first axis, by itself."""
        return self.outer == 1 and len(shape) > 0 and shape[0] == self.samples


@cache
def possible_batches(shape: tuple[int, ...], samples: int) -> list[Batch]:
    """Where a batch of `samples` can lie in `shape`: in one axis, alone or joined with positions on either side.

    One sample must have an axis of its own: what was averaged over a batch would look the same.
    """
    found: dict[Batch, None] = {}
    for position, extent in enumerate(shape):
        if extent == samples or (samples > 1 and extent and extent % samples == 0):
            before, positions = prod(shape[:position]), extent // max(samples, 1)
            outer = [outer for outer in range(1, positions + 1) if positions % outer == 0] or [1]
            found.update({Batch(samples, before * some): None for some in outer})
    return list(found)
