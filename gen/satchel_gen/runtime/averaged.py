"""KFRA's recursion on a graph: the averaged curvature Ḡ of all live edges together, passed node by node.

On a sequence, one edge is live and Ḡ ← 1/N Σ_n J_nᵀ Ḡ J_n. Where a graph branches, Ḡ has a block for each pair of live
edges. It needs first derivatives alone, so it passes any node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from .axes import names
from .evaluate import evaluate
from .joint import Joint, Slot, both_through, elements, rows_through
from .passing import edge_shape, features
from .plan import Plan, Step
from .record import Edge, Record
from .rules import Need
from .uses import Use, join, quantities

Visit: TypeAlias = Callable[[list[tuple[Step, str]], Tensor], None]


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
        outer = joint.take(step)
        for other in dict.fromkeys(slot for rows in outer.values() for slot in rows if slot not in outer):
            rows = {slot: blocks[other] for slot, blocks in outer.items() if other in blocks}
            for edge, block in _rows_through(step, rows, samples).items():
                joint.add_rows(edge, other, block)
        for (a, b), block in _both_through(step, outer, samples).items():
            joint.add(a, b, block)


def _visit(joint: Joint, step: Step, record: Record, slot: Slot, uses: Mapping[int, list[Step]], visit: Visit) -> None:
    kept: Slot | None = None
    for name, parameter in step.parameters.items():
        using = uses[id(parameter)]
        if len(using) == 1:
            block = joint.get(slot, slot)
            assert block is not None
            visit([(step, name)], block.reshape(*record.canonical_output[1:] * 2))
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
    shapes = [record.canonical_output[1:] for record in records]
    slots = [(step.node, -1 - record.output_nr) for step, record in zip(using, records, strict=True)]
    axes = names(records[0].definition.output_axes)[1:]
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


def _rows_through(step: Step, rows: Mapping[Slot, Tensor], samples: int) -> dict[Edge, Tensor]:
    """1/N Σ_n J_nᵀ G [F_x, E], by the layer's own rule if it has one, else sample by sample."""
    layer = None if step.record is None else step.record.definition
    if step.record is None or layer is None or layer.mean_vjp is None:
        found = rows_through(step, {slot: block.expand(samples, -1, -1) for slot, block in rows.items()}, samples)
        return {edge: block.mean(0) for edge, block in found.items()}
    (block,) = rows.values()
    columns = block.T.reshape(block.shape[1], *step.record.canonical_output[1:])
    passed = evaluate(layer.mean_vjp, layer, step.record.operand, columns)
    return {edge: passed.reshape(block.shape[1], elements(edge, samples, step)).T for _, edge in step.inputs}


def _both_through(
    step: Step, outer: Mapping[Slot, Mapping[Slot, Tensor]], samples: int
) -> dict[tuple[Edge, Edge], Tensor]:
    """1/N Σ_n J_nᵀ G J_n [F_x, F_x′], likewise."""
    layer = None if step.record is None else step.record.definition
    if step.record is None or layer is None or layer.sandwich is None:
        spread = {slot: {o: block.expand(samples, -1, -1) for o, block in rows.items()} for slot, rows in outer.items()}
        return {pair: block.mean(0) for pair, block in both_through(step, spread, samples).items()}
    ((slot, blocks),) = outer.items()
    passed = {}
    for _, edge in step.inputs:
        matrix = blocks[slot].reshape(*step.record.canonical_output[1:] * 2)
        size = elements(edge, samples, step)
        passed[edge, edge] = evaluate(layer.sandwich, layer, step.record.operand, matrix).reshape(size, size)
    return passed


def needed_bytes(plan: Plan, samples: int, itemsize: int) -> tuple[int, str]:
    """The most that Ḡ and one step's work hold, and the step that holds it."""
    kept: dict[Edge, int] = {edge: features(edge_shape(edge), samples) for edge in plan.start}
    uses = plan.uses
    most, where = sum(kept.values()) ** 2, "the loss"
    for step in plan.steps:
        arriving = sum(size for edge, size in kept.items() if edge[0] is step.node and edge[1] >= 0)
        incoming = {edge: features(edge_shape(edge), samples) for _, edge in step.inputs}
        by_rule = step.record is not None and step.record.definition.sandwich is not None
        work = 0 if by_rule else samples * (arriving + 2 * sum(incoming.values())) * (arriving + sum(incoming.values()))
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
