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
from .plan import Place, Plan, Step
from .record import Edge
from .uses import join

Visit: TypeAlias = Callable[[Sequence[Place], Tensor], None]


def sweep_averaged(plan: Plan, start: Edge, averaged: Tensor, samples: int, visit: Visit) -> None:
    """Pass Ḡ [F, F] from `start`; `visit` gets each wanted parameter's uses and Ḡ over them, joined along their positions."""
    joint = Joint()
    joint.add(start, start, averaged)
    for step in plan.steps:
        if not any(slot[0] is step.node and slot[1] >= 0 for slot in joint.slots):
            continue
        _visit(joint, step, plan.uses, visit)
        outer = joint.take(step)
        for other in dict.fromkeys(slot for rows in outer.values() for slot in rows if slot not in outer):
            rows = {slot: blocks[other] for slot, blocks in outer.items() if other in blocks}
            for edge, block in _rows_through(step, rows, samples).items():
                joint.add_rows(edge, other, block)
        for (a, b), block in _both_through(step, outer, samples).items():
            joint.add(a, b, block)


def _visit(joint: Joint, step: Step, uses: Mapping[int, Sequence[Place]], visit: Visit) -> None:
    """Note Ḡ at the output where a parameter has other uses. It is complete with its last one."""
    here = [Place(step, call, name) for call in step.calls for name in call.parameters]
    here = [place for place in here if _slot(place) in joint.slots]
    for slot in dict.fromkeys(_slot(place) for place in here if len(uses[id(place.parameter)]) > 1):
        kept = _kept(slot)
        for other in list(joint.slots):
            block = joint.get(slot, other)
            if block is not None:
                joint.add(kept, other, block)
        own = joint.get(slot, slot)
        assert own is not None
        joint.add(kept, kept, own)
    for place in here:
        places = uses[id(place.parameter)]
        if places[-1].call is place.call and places[-1].name == place.name:
            visit(places, _over_uses(joint, places))


def _slot(place: Place) -> Slot:
    return place.step.node, place.call.record.output_nr


def _kept(slot: Slot) -> Slot:
    return slot[0], -1 - slot[1]


def _over_uses(joint: Joint, places: Sequence[Place]) -> Tensor:
    """Ḡ over the outputs of uses of one kind, joined along their positions on both sides."""
    slots = [_slot(place) if len(places) == 1 else _kept(_slot(place)) for place in places]
    shapes = [place.call.record.canonical_output[1:] for place in places]
    axes = names(places[0].call.record.definition.output_axes)[1:]
    own = joint.get(slots[0], slots[0])
    assert own is not None
    rows = []
    for a, shape_a, (_, one, _) in zip(slots, shapes, places, strict=True):
        blocks = []
        for b, shape_b, (_, other, _) in zip(slots, shapes, places, strict=True):
            block = joint.get(a, b)
            block = own.new_zeros(prod(shape_a), prod(shape_b)) if block is None else block
            blocks.append(other.widened(one.widened(block.reshape(*shape_a, *shape_b), len(shape_a) - 1), -1))
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
        shared = any(len(uses[id(p)]) > 1 for call in step.calls for p in call.parameters.values())
        for edge in [edge for edge in kept if edge[0] is step.node and edge[1] >= 0]:
            size = kept.pop(edge)
            if shared:
                kept[edge[0], -1 - edge[1]] = size
    return most * itemsize, where


def start_of(factor: Tensor, samples: int) -> Tensor:
    """Σ_{v,n} s sᵀ [F, F] of an exact factor [V, *edge]."""
    flat = factor.reshape(factor.shape[0] * samples, features(factor.shape[1:], samples))
    return torch.mm(flat.T, flat)
