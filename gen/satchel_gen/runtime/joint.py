"""A curvature of all live edges of a graph together, in blocks per sample, and how it passes a step from both sides.

Where a graph branches, the curvatures of the branches are not independent, so there is a block for each pair of live edges. Passing
a step turns the rows of its output into rows of its inputs, G[x, e] += J_nᵀ G[y, e], and its own block from both sides, J_nᵀ G J_n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from .errors import BatchAxisLost
from .passing import edge_shape, features
from .plan import Step
from .record import Edge
from .sweep import pass_step

#: A live edge, or the output of a layer whose parameter is used again further down: (node, -1 - output number).
Slot = Edge


class Joint:
    """A symmetric matrix in blocks [*, F_a, F_b]; an absent block is zero."""

    def __init__(self) -> None:
        self.slots: dict[Slot, None] = {}
        self._blocks: dict[tuple[Slot, Slot], Tensor] = {}

    def get(self, a: Slot, b: Slot) -> Tensor | None:
        found = self._blocks.get((a, b))
        if found is None and (b, a) in self._blocks:
            found = self._blocks[b, a].mT
        return found

    def add(self, a: Slot, b: Slot, block: Tensor) -> None:
        self.slots.update({a: None, b: None})
        before = self.get(a, b)
        self._blocks.pop((b, a), None)
        self._blocks[a, b] = block if before is None else before + block

    def rows(self, a: Slot) -> dict[Slot, Tensor]:
        """The blocks of a slot, by the other."""
        return {b: block for b in self.slots if (block := self.get(a, b)) is not None}

    def over(self, slots: Sequence[Slot]) -> Tensor:
        """The matrix over some slots [*, ΣF, ΣF]."""
        rows = [self.rows(a) for a in slots]
        sizes = [next(iter(blocks.values())).shape[1] for blocks in rows]
        like = next(iter(rows[0].values()))
        found = [
            [
                blocks[b] if b in blocks else like.new_zeros(len(like), here, size)
                for b, size in zip(slots, sizes, strict=True)
            ]
            for here, blocks in zip(sizes, rows, strict=True)
        ]
        return torch.cat([torch.cat(row, 2) for row in found], 1)

    def drop(self, a: Slot) -> None:
        self._blocks = {pair: block for pair, block in self._blocks.items() if a not in pair}
        self.slots.pop(a, None)

    def take(self, step: Step) -> dict[Slot, dict[Slot, Tensor]]:
        """Remove the rows of what has arrived at a step, by slot."""
        arrived = [slot for slot in self.slots if slot[0] is step.node and slot[1] >= 0]
        outer = {slot: self.rows(slot) for slot in arrived}
        for slot in arrived:
            self.drop(slot)
        return outer

    def add_rows(self, edge: Edge, other: Slot, block: Tensor) -> None:
        """Rows that were passed to an edge. What the other slot is to itself stays, or is passed from both sides."""
        self.add(edge, other, block + block.mT if edge == other else block)


def rows_through(step: Step, rows: Mapping[Slot, Tensor], samples: int) -> dict[Edge, Tensor]:
    """Blocks [N, F_y, E] of a step's outputs → J_nᵀ G [N, F_x, E] by input edge."""
    columns = {slot[1]: columns_of(block, slot, samples, step) for slot, block in rows.items()}
    return {edge: _rows_of(found, edge, samples, step) for edge, found in pass_step(step, columns).items()}


def both_through(
    step: Step, outer: Mapping[Slot, Mapping[Slot, Tensor]], samples: int
) -> dict[tuple[Edge, Edge], Tensor]:
    """Blocks [N, F_y, F_y′] → J_nᵀ G J_n [N, F_x, F_x′]: once from the right, then from the left."""
    right: dict[Edge, dict[Slot, Tensor]] = {}  # by input edge and output: G J_n [N, F_y, F_x]
    for slot, blocks in outer.items():
        for edge, found in rows_through(step, {o: blocks[o] for o in outer if o in blocks}, samples).items():
            right.setdefault(edge, {})[slot] = found.mT
    passed: dict[tuple[Edge, Edge], Tensor] = {}
    edges = list(right)
    for number, edge in enumerate(edges):
        for other, found in rows_through(step, right[edge], samples).items():
            if other in edges[number:]:  # the matrix is symmetric
                passed[other, edge] = found
    return passed


def columns_of(block: Tensor, slot: Slot, samples: int, step: Step) -> Tensor:
    """[N, F, E] → [E, *edge]."""
    assert block.shape[1] == elements(slot, samples, step)
    return block.permute(2, 0, 1).reshape(block.shape[2], *edge_shape(slot))


def _rows_of(columns: Tensor, edge: Edge, samples: int, step: Step) -> Tensor:
    """[E, *edge] → [N, F, E]."""
    return columns.reshape(columns.shape[0], samples, elements(edge, samples, step)).permute(1, 2, 0)


def elements(edge: Edge, samples: int, step: Step) -> int:
    """Elements of one sample of an edge: the samples must be outermost (`probe` has seen to that)."""
    shape = edge_shape(edge)
    if prod(shape) % max(samples, 1):
        raise BatchAxisLost(step.where, shape, samples)
    return features(shape, samples)
