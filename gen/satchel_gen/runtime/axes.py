"""Named axes. A starred one stands for any number of axes, zero included; in canonical tensors it is flattened to one.

Joined axes, ("g", "c"), are one axis of the tensor as torch stores it and two of the canonical one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from types import MappingProxyType
from typing import TypeAlias

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
    shape = canonical_shape(axes, tensor.shape[lead:])
    assert shape is not None, f"a tensor of shape {tuple(tensor.shape)} has no axes {axes}"
    return tensor.reshape(*tensor.shape[:lead], *shape)


def extents(axes: Axes, shape: Sequence[int]) -> Mapping[str, int]:
    """Extent by axis name, without the star, of a canonical shape."""
    return {axis.rstrip("*"): extent for axis, extent in zip(names(axes), shape, strict=True)}
