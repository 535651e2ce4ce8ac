"""KFRA's recursion on a graph: the averaged curvature Ḡ of all live edges together, passed node by node.

On a sequence, one edge is live and Ḡ ← 1/N Σ_n J_nᵀ Ḡ J_n. Where a graph branches, the branches' curvatures are not
independent, so Ḡ has a block for each pair of live edges: passing a node turns the rows of its output into rows of its inputs,
Ḡ[x, e] += 1/N Σ_n J_nᵀ Ḡ[y, e], and its own block from both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import BatchAxisLost
from .evaluate import evaluate
from .passing import edge_shape, features, pull
from .plan import Plan, Step
from .record import Edge, Record
from .residual import canonical_output
from .rules import Need
from .uses import Use, join, quantities

#: A live edge, or the output of a layer whose parameter is used again further down: (node, -1 - output number).
Slot: TypeAlias = Edge

Visit: TypeAlias = Callable[[list[tuple[Step, str]], Tensor], None]


class Joint:
    """A symmetric matrix in blocks [F_a, F_b]; an absent block is zero."""

    def __init__(self) -> None:
        self.slots: dict[Slot, None] = {}
        self._blocks: dict[tuple[Slot, Slot], Tensor] = {}

    def get(self, a: Slot, b: Slot) -> Tensor | None:
        if (b, a) in self._blocks:
            return self._blocks[b, a].T
        return self._blocks.get((a, b))

    def add(self, a: Slot, b: Slot, block: Tensor) -> None:
        self.slots.update({a: None, b: None})
        before = self.get(a, b)
        self._blocks.pop((b, a), None)
        self._blocks[a, b] = block if before is None else before + block

    def rows(self, a: Slot) -> dict[Slot, Tensor]:
        """The blocks of a slot, by the other."""
        return {b: block for b in self.slots if (block := self.get(a, b)) is not None}

    def drop(self, a: Slot) -> None:
        self._blocks = {pair: block for pair, block in self._blocks.items() if a not in pair}
        self.slots.pop(a, None)


def sweep_averaged(plan: Plan, start: Edge, averaged: Tensor, samples: int, visit: Visit) -> None:
    """Pass Ḡ [F, F] from `start`; `visit` gets each wanted parameter's uses and Ḡ over them, joined along their positions."""
    joint = Joint()
    joint.add(start, start, averaged)
    uses = plan.uses
    for step in plan.steps:
        arrived = [slot for slot in joint.slots if slot[0] is step.node and slot[1] >= 0]
        if not arrived:
            continue
        if step.record is not None:
            _visit(joint, step, step.record, arrived[0], uses, visit)
        outer = {slot: joint.rows(slot) for slot in arrived}
        for slot in arrived:
            joint.drop(slot)
        others = dict.fromkeys(slot for rows in outer.values() for slot in rows if slot not in outer)
        pass_rows = _rows_through_node if step.record is None else _rows_through_layer
        for other in others:
            rows = {slot: blocks[other] for slot, blocks in outer.items() if other in blocks}
            for edge, block in pass_rows(step, rows, samples).items():
                # What the other slot is to itself is passed from both sides below, or stays.
                joint.add(edge, other, block + block.T if edge == other else block)
        pass_both = _both_through_node if step.record is None else _both_through_layer
        for (a, b), block in pass_both(step, outer, samples).items():
            joint.add(a, b, block)


def _visit(joint: Joint, step: Step, record: Record, slot: Slot, uses: Mapping[int, list[Step]], visit: Visit) -> None:
    kept: Slot | None = None
    for name, parameter in step.parameters.items():
        using = uses[id(parameter)]
        if len(using) == 1:
            block = joint.get(slot, slot)
            assert block is not None
            visit([(step, name)], block.reshape(*canonical_output(record)[1:] * 2))
            continue
        if kept is None:
            kept = (slot[0], -1 - slot[1])
            for other in list(joint.slots):
                block = joint.get(slot, other)
                if block is not None:
                    joint.add(kept, other, block)
            own = joint.get(slot, slot)
            assert own is not None
            joint.add(kept, kept, own)
    # A parameter is complete with its last use.
    for parameter in step.parameters.values():
        using = uses[id(parameter)]
        if len(using) > 1 and using[-1] is step:
            visit([(use, _name(use, parameter)) for use in using], _over_uses(joint, using))


def _name(step: Step, parameter: Tensor) -> str:
    return next(name for name, candidate in step.parameters.items() if candidate is parameter)


def _over_uses(joint: Joint, using: Sequence[Step]) -> Tensor:
    """Ḡ over the outputs of several layers of one kind, joined along their positions on both sides."""
    records = [step.record for step in using if step.record is not None]
    shapes = [canonical_output(record)[1:] for record in records]
    slots = [(step.node, -1 - record.output_nr) for step, record in zip(using, records, strict=True)]
    axes = records[0].definition.output_axes[1:]
    own = joint.get(slots[0], slots[0])
    assert own is not None
    rows = []
    for a, shape_a in zip(slots, shapes, strict=True):
        blocks = []
        for b, shape_b in zip(slots, shapes, strict=True):
            block = joint.get(a, b)
            block = own.new_zeros(prod(shape_a), prod(shape_b)) if block is None else block
            blocks.append(block.reshape(*shape_a, *shape_b))
        rows.append(join(blocks, axes, len(shape_a)))
    return join(rows, axes, 0)


def _rows_through_layer(step: Step, rows: Mapping[Slot, Tensor], samples: int) -> dict[Edge, Tensor]:
    record = step.record
    assert record is not None
    layer = record.definition
    (block,) = rows.values()
    passed = {}
    for _, edge in step.inputs:
        columns = block.T.reshape(block.shape[1], *canonical_output(record)[1:])
        found = evaluate(layer.mean_vjp, layer, record.operand, columns)
        passed[edge] = found.reshape(block.shape[1], _elements(edge, samples, step)).T
    return passed


def _both_through_layer(
    step: Step, outer: Mapping[Slot, Mapping[Slot, Tensor]], samples: int
) -> dict[tuple[Edge, Edge], Tensor]:
    record = step.record
    assert record is not None
    layer = record.definition
    ((slot, blocks),) = outer.items()
    passed = {}
    for _, edge in step.inputs:
        matrix = blocks[slot].reshape(*canonical_output(record)[1:] * 2)
        size = _elements(edge, samples, step)
        passed[edge, edge] = evaluate(layer.sandwich, layer, record.operand, matrix).reshape(size, size)
    return passed


def _rows_through_node(step: Step, rows: Mapping[Slot, Tensor], samples: int) -> dict[Edge, Tensor]:
    """Every sample passes the same rows; then the mean over samples."""
    columns = {slot[1]: _for_every_sample(block.T, slot, samples, step) for slot, block in rows.items()}
    passed = pull(step, columns)
    return {edge: _by_sample(found, edge, samples, step).mean(1).T for edge, found in passed.items()}


def _both_through_node(
    step: Step, outer: Mapping[Slot, Mapping[Slot, Tensor]], samples: int
) -> dict[tuple[Edge, Edge], Tensor]:
    """1/N Σ_n J_nᵀ G J_n: once from the right, for the rows of each output; then from the left, with rows that differ by sample."""
    right: dict[Edge, dict[int, Tensor]] = {}  # by input edge and output number: (G J_n)ᵀ [F_in, N, F_out]
    for slot, blocks in outer.items():
        columns = {
            other[1]: _for_every_sample(blocks[other], other, samples, step) for other in outer if other in blocks
        }
        for edge, found in pull(step, columns).items():
            right.setdefault(edge, {})[slot[1]] = _by_sample(found, edge, samples, step).permute(2, 1, 0)
    passed: dict[tuple[Edge, Edge], Tensor] = {}
    edges = list(right)
    for number, edge in enumerate(edges):
        columns = {n: found.reshape(found.shape[0], *edge_shape((step.node, n))) for n, found in right[edge].items()}
        for other, found in pull(step, columns).items():
            if other in edges[number:]:  # the matrix is symmetric
                passed[other, edge] = _by_sample(found, other, samples, step).mean(1).T
    return passed


def _for_every_sample(rows: Tensor, slot: Slot, samples: int, step: Step) -> Tensor:
    """[E, F] → [E, *edge], the same for each sample."""
    assert rows.shape[1] == _elements(slot, samples, step)
    return rows[:, None].expand(-1, samples, -1).reshape(rows.shape[0], *edge_shape(slot))


def _by_sample(columns: Tensor, edge: Edge, samples: int, step: Step) -> Tensor:
    """[E, *edge] → [E, N, F]."""
    return columns.reshape(columns.shape[0], samples, _elements(edge, samples, step))


def _elements(edge: Edge, samples: int, step: Step) -> int:
    """Elements of one sample, of which a mean over samples is taken: the samples must be outermost (`probe` has seen to that)."""
    shape = edge_shape(edge)
    if prod(shape) % max(samples, 1):
        raise BatchAxisLost(step.where, shape, samples)
    return features(shape, samples)


def needed_bytes(plan: Plan, samples: int, itemsize: int) -> tuple[int, str]:
    """The most that Ḡ and one step's work hold, and the step that holds it."""
    kept: dict[Edge, int] = {edge: features(edge_shape(edge), samples) for edge in plan.start}
    uses = plan.uses
    most, where = sum(kept.values()) ** 2, "the loss"
    for step in plan.steps:
        arriving = sum(size for edge, size in kept.items() if edge[0] is step.node and edge[1] >= 0)
        incoming = {edge: features(edge_shape(edge), samples) for _, edge in step.inputs}
        work = 0 if step.record is not None else 2 * samples * arriving * sum(incoming.values())
        here = (sum(kept.values()) + sum(incoming.values())) ** 2 + work
        if here > most:
            most, where = here, step.name if step.record is None else step.record.where
        kept.update(incoming)
        shared = any(len(uses[id(parameter)]) > 1 for parameter in step.parameters.values())
        for edge in [edge for edge in kept if edge[0] is step.node and edge[1] >= 0]:
            size = kept.pop(edge)
            if shared:
                kept[edge[0], -1 - edge[1]] = size
    return most * itemsize, where


def averaged_quantities(
    using: Sequence[tuple[Step, str]], averaged: Tensor, needs: Sequence[Need]
) -> dict[Need, Tensor]:
    """The quantities of Ḡ for one parameter."""
    records = [(step.record, name) for step, name in using if step.record is not None]
    asked = {need.quantity: need for need in needs}
    found = quantities([Use(record, name) for record, name in records], asked, averaged)
    return {asked[name]: value for name, value in found.items()}


def start_of(factor: Tensor, samples: int) -> Tensor:
    """Σ_{v,n} s sᵀ [F, F] of an exact factor [V, *edge]."""
    flat = factor.reshape(factor.shape[0] * samples, features(factor.shape[1:], samples))
    return torch.mm(flat.T, flat)
