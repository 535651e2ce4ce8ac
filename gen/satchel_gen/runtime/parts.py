"""Which rows of a parameter a view of it is: slices of packed weights, transposed matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .passing import edge_shape, pull
from .plan import Step
from .record import Edge
from .sweep import add, take
from .torch_private import VIEWS, leaf_of


@dataclass(frozen=True)
class Part:
    """Where a definition's parameter lies in ours: rows from `start`, of `total`; columns of ours if `transposed`."""

    start: int
    extent: int
    total: int
    transposed: bool = False


def part_of(edge: Edge, leaf: Tensor, axes: tuple[int, ...], shared: Mapping[Node, Step]) -> Part | None:
    """The part of a parameter that arrives at an edge by views alone; `axes` says which of the definition's its axes are."""
    path = _views(edge, leaf, shared)
    shape = edge_shape(edge)
    if path is None or len(shape) != len(axes) or leaf.ndim != len(axes):
        return None
    extents = [shape[axes.index(axis)] for axis in range(len(axes))]
    if not path or [step.name for step in path] == ["TBackward0"]:
        straight = axes if not path else axes[::-1]
        return Part(0, extents[0], extents[0], transposed=straight != tuple(range(len(axes))))
    numbers = torch.stack([_numbered(shape, axes.index(axis), leaf) for axis in range(len(axes))])
    live = {edge: numbers}
    for step in path:
        add(live, pull(step, take(live, step)))
    (numbers,) = live.values()
    for transposed in (False, True) if len(axes) == 2 else (False,):
        part = _rows(numbers.mT if transposed else numbers, extents)
        if part is not None:
            return replace(part, transposed=transposed)
    return None


def _views(edge: Edge, leaf: Tensor, shared: Mapping[Node, Step]) -> list[Step] | None:
    """The nodes from an edge to a parameter, if they do nothing but arrange it."""
    path, node = [], edge[0]
    while node in shared:
        step = shared[node]
        following = [*((position, below) for position, below, _ in step.leaves), *step.inputs]
        if step.name not in VIEWS or len(following) != 1:
            return None
        path.append(Step(node, None, tuple(following)))
        node = following[0][1][0]
    return path if leaf_of(node) is leaf else None


def _numbered(shape: Sequence[int], axis: int, like: Tensor) -> Tensor:
    """1, 2, … along an axis, the same along all others."""
    numbers = torch.arange(1, shape[axis] + 1, device=like.device).to(like.dtype)
    return numbers.reshape([-1 if k == axis else 1 for k in range(len(shape))]).expand(tuple(shape))


def _rows(numbers: Tensor, extents: Sequence[int]) -> Part | None:
    """Rows that hold all that is numbered, in order: `numbers` [axis, *parameter] are zero where nothing arrived."""
    if tuple(numbers.shape[2:]) != tuple(extents[1:]):
        return None
    on = numbers[0].reshape(numbers.shape[1], -1).any(1)
    start = int(on.int().argmax())
    rows = numbers[:, start : start + extents[0]]
    wanted = torch.stack([_numbered(extents, axis, numbers) for axis in range(len(extents))])
    if int(on.sum()) != extents[0] or not torch.equal(rows, wanted):
        return None
    return Part(start, extents[0], numbers.shape[1])
