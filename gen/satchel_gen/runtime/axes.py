"""Named axes: a starred one stands for any number of axes, zero included, and is flattened to one in canonical tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

from torch import Tensor


def canonical_shape(axes: tuple[str, ...], shape: Sequence[int]) -> tuple[int, ...] | None:
    """`shape` with the starred axis flattened; None if its rank cannot fit `axes`."""
    star = starred(axes)
    if star is None:
        return tuple(shape) if len(shape) == len(axes) else None
    after = len(axes) - star - 1
    if len(shape) < len(axes) - 1:
        return None
    stop = len(shape) - after
    return (*shape[:star], prod(shape[star:stop]), *shape[stop:])


@cache
def starred(axes: tuple[str, ...]) -> int | None:
    """Position of the starred axis."""
    return next((position for position, axis in enumerate(axes) if axis.endswith("*")), None)


def canonical(tensor: Tensor, axes: tuple[str, ...], lead: int = 0) -> Tensor:
    """`tensor` [*lead, *shape] with the starred axis of `shape` flattened; `lead` counts the axes in front that have no name."""
    shape = canonical_shape(axes, tensor.shape[lead:])
    assert shape is not None, f"a tensor of shape {tuple(tensor.shape)} has no axes {axes}"
    return tensor.reshape(*tensor.shape[:lead], *shape)


def extents(axes: tuple[str, ...], shape: Sequence[int]) -> Mapping[str, int]:
    """Extent by axis name, without the star, of a canonical shape."""
    return {axis.rstrip("*"): extent for axis, extent in zip(axes, shape, strict=True)}


@dataclass(frozen=True)
class Batch:
    """Which sample an element of a tensor belongs to: flattened, the tensor is [outer, samples, inner].

    outer = 1 where the batch is the first axis, alone or joined with positions; a sequence-first tensor [T, N, …] has outer = T.
    """

    samples: int
    outer: int = 1

    def fits(self, shape: Sequence[int]) -> bool:
        return self.samples == 1 or self in possible_batches(tuple(shape), self.samples)

    def canonical_shape(self, axes: tuple[str, ...], shape: Sequence[int]) -> tuple[int, ...] | None:
        """`shape` with the batch in front and the starred axis flattened; None if it cannot fit `axes`."""
        if self._is_first(shape):
            return canonical_shape(axes, shape)
        those = rows(axes, shape)
        if starred(axes) != 1 or not self.samples or not self.fits(those):
            return None
        return (self.samples, prod(those) // self.samples, *shape[len(those) :])

    def to_front(self, tensor: Tensor, axes: tuple[str, ...], lead: int = 0) -> Tensor:
        """`tensor` [*lead, *shape] as [*lead, *canonical]."""
        if self._is_first(tensor.shape[lead:]):
            return canonical(tensor, axes, lead)
        before, shape = tensor.shape[:lead], self.canonical_shape(axes, tensor.shape[lead:])
        assert shape is not None, f"a tensor of shape {tuple(tensor.shape)} has no batch {self}"
        split = tensor.reshape(*before, self.outer, self.samples, shape[1] // self.outer, *shape[2:])
        return split.movedim(lead, lead + 1).reshape(*before, *shape)

    def to_place(self, tensor: Tensor, axes: tuple[str, ...], shape: Sequence[int], lead: int = 0) -> Tensor:
        """Inverse of `to_front`."""
        before = tensor.shape[:lead]
        if self._is_first(shape):
            return tensor.reshape(*before, *shape)
        split = tensor.reshape(*before, self.samples, self.outer, -1, *tensor.shape[lead + 2 :])
        return split.movedim(lead, lead + 1).reshape(*before, *shape)

    def _is_first(self, shape: Sequence[int]) -> bool:
        return self.outer == 1 and len(shape) > 0 and shape[0] == self.samples


def rows(axes: tuple[str, ...], shape: Sequence[int]) -> tuple[int, ...]:
    """The axes among which the batch can be: the first, and the starred ones if they are next to it."""
    return tuple(shape[: max(1, len(shape) - len(axes) + 2)] if starred(axes) == 1 else shape[:1])


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
