"""Named axes: a starred one stands for any number of axes, zero included, and is flattened to one in canonical tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
