"""KFRA's recursion on a graph: the averaged curvature Ḡ of all live edges together, passed node by node.

On a sequence, one edge is live and Ḡ ← 1/N Σ_n J_nᵀ Ḡ J_n. Where a graph branches, Ḡ has a block for each pair of live
edges. It needs first derivatives alone, so it passes any node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import TypeAlias

import torch
from torch import Tensor

from .evaluate import evaluate
from .joint import Joint, Slot, both_through, elements, rows_through
from .passing import edge_shape, features
from .plan import Plan, Step
from .record import Edge, Record
from .rules import Need
from .uses import BLOCK, PER_SAMPLE, Use

#: Two uses of a parameter, and Ḡ between their outputs [*output, *output].
Pair: TypeAlias = tuple[Use, Use, Tensor]
Visit: TypeAlias = Callable[[Tensor, Sequence[Pair]], None]


def sweep_averaged(plan: Plan, start: Edge, averaged: Tensor, samples: int, visit: Visit) -> None:
    """Pass Ḡ [F, F] from `start`; `visit` gets each wanted parameter, with Ḡ between its uses."""
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
    if any(len(uses[id(parameter)]) > 1 for parameter in step.parameters.values()):
        _keep(joint, slot)
    for name, parameter in step.parameters.items():
        using = uses[id(parameter)]
        if using == [step]:
            visit(parameter, _pairs(joint, {slot: Use(record, name)}))
        elif using[-1] is step:  # a parameter is complete with its last use
            visit(parameter, _pairs(joint, dict(_kept_use(use, parameter) for use in using)))


def _keep(joint: Joint, slot: Slot) -> None:
    """Hold an output until all uses of the layer's parameters are in."""
    kept = _kept(slot)
    for other in list(joint.slots):
        block = joint.get(slot, other)
        if block is not None:
            joint.add(kept, other, block)
    own = joint.get(slot, slot)
    assert own is not None
    joint.add(kept, kept, own)


def _kept(slot: Slot) -> Slot:
    return (slot[0], -1 - slot[1])


def _kept_use(step: Step, parameter: Tensor) -> tuple[Slot, Use]:
    assert step.record is not None
    name = next(name for name, candidate in step.parameters.items() if candidate is parameter)
    return _kept((step.node, step.record.output_nr)), Use(step.record, name)


def _pairs(joint: Joint, uses: Mapping[Slot, Use]) -> list[Pair]:
    """Ḡ between the outputs of any two uses, canonical; absent where it is zero."""
    found: list[Pair] = []
    for a, one in uses.items():
        for b, other in uses.items():
            block = joint.get(a, b)
            if block is not None:
                shape = (*one.record.canonical_output[1:], *other.record.canonical_output[1:])
                found.append((one, other, block.reshape(shape)))
    return found


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
        blocks = any(Use(record, name).offers(BLOCK) for record, parameters in step.used for name in parameters)
        by_rule = step.record is not None and step.record.definition.sandwich is not None and not blocks
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


def averaged_quantities(pairs: Sequence[Pair], needs: Sequence[Need]) -> dict[Need, Tensor]:
    """The quantities of Ḡ for one parameter: they add over pairs of uses."""
    found: dict[Need, Tensor] = {}
    for need in needs:
        if all(use.offers(need.quantity) for pair in pairs for use in pair[:2]):
            parts = (
                _block(*pair) if need.quantity == BLOCK else pair[0].value(need.quantity, pair[2]) for pair in pairs
            )
            found[need] = reduce(add, parts)
    return found


def _block(one: Use, other: Use, averaged: Tensor) -> Tensor:
    """1/N Σ_n J_nᵀ Ḡ J_n [P, P] between two uses: individual pullbacks of its columns, then of its rows."""
    samples, shape, further = one.record.samples, one.record.canonical_output[1:], other.record.canonical_output[1:]
    columns = averaged.reshape(*shape, -1).movedim(-1, 0)[:, None]
    rows = one.value(PER_SAMPLE, columns.expand(-1, samples, *shape)).flatten(2)
    rows = rows.permute(2, 1, 0).reshape(-1, samples, *further)
    return other.value(PER_SAMPLE, rows).flatten(2).mean(1)


def start_of(factor: Tensor, samples: int) -> Tensor:
    """Σ_{v,n} s sᵀ [F, F] of an exact factor [V, *edge]."""
    flat = factor.reshape(factor.shape[0] * samples, features(factor.shape[1:], samples))
    return torch.mm(flat.T, flat)
