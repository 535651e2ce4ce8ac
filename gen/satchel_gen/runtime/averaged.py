"""KFRA's recursion on a graph: the averaged curvature Ḡ of all live edges together, passed node by node.

On a sequence, one edge is live and Ḡ ← 1/N Σ_n J_nᵀ Ḡ J_n. Where a graph branches, Ḡ has a block for each pair of live
edges. It needs first derivatives alone, so it passes any node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .evaluate import evaluate
from .joint import Joint, Slot, both_through, elements, rows_through
from .memory import copied
from .passing import edge_shape, features
from .plan import Place, Plan, Step
from .record import Edge
from .rules import BLOCK, Need
from .uses import PER_SAMPLE


class Pair(NamedTuple):
    """Two uses of a parameter, each at one output of its node, and Ḡ [E, E′] between these."""

    one: Place
    other: Place
    outputs: tuple[int, int]
    averaged: Tensor


Visit: TypeAlias = Callable[[Tensor, Sequence[Pair]], None]


def sweep_averaged(plan: Plan, start: Edge, averaged: Tensor, samples: int, visit: Visit) -> None:
    """Pass Ḡ [F, F] from `start`; `visit` gets each wanted parameter, with Ḡ between its uses."""
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
    """Hold the outputs until all uses of the step's parameters are in. A parameter is complete with its last one."""
    places = [Place(step, call, name) for call in step.calls for name in call.parameters]
    parameters = {id(place.parameter): place.parameter for place in places}
    complete = [key for key in parameters if uses[key][-1].step is step]
    for key in complete:
        visit(parameters[key], _pairs(joint, step, uses[key]))
    waiting = [place for place in places if id(place.parameter) not in complete]
    for number in dict.fromkeys(number for place in waiting for number in place.call.outputs):
        if (step.node, number) in joint.slots:
            _keep(joint, (step.node, number))


def _keep(joint: Joint, slot: Slot) -> None:
    kept = _kept(slot)
    for other in list(joint.slots):
        block = joint.get(slot, other)
        if block is not None:
            joint.add(kept, other, block)
    own = joint.get(slot, slot)
    assert own is not None
    joint.add(kept, kept, own)


def _kept(slot: Slot) -> Slot:
    return slot[0], -1 - slot[1]


def _pairs(joint: Joint, step: Step, places: Sequence[Place]) -> list[Pair]:
    """Ḡ between the outputs of any two uses, seen from the step of the last one; absent where it is zero."""
    ends = []
    for place in places:
        for number in place.call.outputs:
            slot = place.step.node, number
            ends.append((place, number, slot if place.step is step else _kept(slot)))
    return [
        Pair(one, other, (number, further), block)
        for one, number, a in ends
        for other, further, b in ends
        if (block := joint.get(a, b)) is not None
    ]


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
        passing = 0 if by_rule else (arriving + 2 * sum(incoming.values())) * (arriving + sum(incoming.values()))
        own = [
            p.numel()
            for call in step.calls
            for name, p in call.parameters.items()
            if Place(step, call, name).offers(BLOCK)
        ]
        work = samples * max(passing, *((2 * arriving + size) * (arriving + size) for size in own), 0)
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


def averaged_quantities(pairs: Sequence[Pair], needs: Sequence[Need]) -> dict[Need, Tensor]:
    """The quantities of Ḡ for one parameter: they add over pairs of uses."""
    found: dict[Need, Tensor] = {}
    for need in needs:
        if all(pair.one.offers(need.quantity) and pair.other.offers(need.quantity) for pair in pairs):
            parts = (_block(pair) if need.quantity == BLOCK else _by_rule(pair, need.quantity) for pair in pairs)
            found[need] = reduce(add, parts)
    return found


def _by_rule(pair: Pair, quantity: str) -> Tensor:
    """A quantity by the rule of its definition, from Ḡ between canonical outputs."""
    one, other = pair.one.call, pair.other.call
    shape, further = one.record.canonical_output[1:], other.record.canonical_output[1:]
    averaged = one.widened(pair.averaged.reshape(*shape, *further), len(shape) - 1)
    value = pair.one.use.value(quantity, other.widened(averaged, -1))
    # Ḡ is that of the layer's other parameters, too, and a hook may change their fields.
    return copied(value, pair.one.parameter) if value.data_ptr() == pair.averaged.data_ptr() else value


def _block(pair: Pair) -> Tensor:
    """1/N Σ_n J_nᵀ Ḡ J_n [P, P] between two uses: individual pullbacks of its columns, then of its rows."""
    rows = _pulled(pair.one, pair.outputs[0], pair.averaged.T[:, None])
    return _pulled(pair.other, pair.outputs[1], rows.permute(2, 1, 0)).mean(1)


def _pulled(place: Place, output: int, columns: Tensor) -> Tensor:
    """[V, N, P] of columns [V, N, E] at an output, or [V, 1, E] of all samples."""
    shape, samples = edge_shape((place.step.node, output)), place.call.record.samples
    factor = place.call.factor({output: columns.expand(-1, samples, -1).reshape(len(columns), *shape)})
    return place.use.value(PER_SAMPLE, factor).flatten(2)


def start_of(factor: Tensor, samples: int) -> Tensor:
    """Σ_{v,n} s sᵀ [F, F] of an exact factor [V, *edge]."""
    flat = factor.reshape(factor.shape[0] * samples, features(factor.shape[1:], samples))
    return torch.mm(flat.T, flat)
