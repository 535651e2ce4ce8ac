"""Refuses, at the walk, what would give a wrong number: before any field is overwritten."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from math import prod

import torch
from torch.autograd.graph import Node

from . import curvature, estimate
from .context import backpack
from .demand import AVERAGED, RESIDUAL, Demand
from .errors import CheckpointedRegion, MemoryLimit, SatchelError, SharedByKinds, SparseGradient, UnsupportedModule
from .flags import Flag, first_raised
from .nodes import NodeRecord, Owned, resolve
from .plan import Plan
from .probe import Found, Probe
from .pullback import Pullback
from .record import Edge, Mark
from .rules import BLOCK, registry
from .second import is_linear
from .settings import current
from .structure import Outline, reads, remember
from .torch_private import has_sparse_gradient, reentrant_checkpoint
from .uses import alike


def check(
    plan: Plan,
    context: backpack,
    start: Mapping[Edge, Sequence[int]],
    samples: Sequence[int],
    curved: bool,
    marks: Iterable[Mark],
    known: Outline | None,
) -> tuple[Plan, int, list[Flag]]:
    """Refuse the plan, or return it with the uses of parameters by nodes, N, and what its tensors have to tell at the end.

    `samples` are the numbers of samples that the batch may have, `marks` modules above the plan, `known` what graphs of the same
    structure have in common.
    """
    demand = context.demand
    checkpoint = reentrant_checkpoint(plan.nodes)
    if checkpoint is not None:
        raise CheckpointedRegion(checkpoint, demand.names)
    plan, count, found, holds = _survey(plan, context, start, samples, marks)
    if curved:
        curvature.check_plan(plan, demand, count, found.flags)
    if holds and known is not None:
        remember(plan, known, count, demand)
    return plan, count, found.flags


def _survey(
    plan: Plan, context: backpack, start: Mapping[Edge, Sequence[int]], samples: Sequence[int], marks: Iterable[Mark]
) -> tuple[Plan, int, Found, bool]:
    """The plan, N and what a probe has found; and whether the same would come of every plan of this structure."""
    features = context.demand.names
    for record in plan.records:
        layer = record.definition
        for option, supported in layer.options.items():
            reason = layer.reasons.get(option, "")
            curvature.refuse_option(record, option, record.options[option], supported, features, reason)
        if record.checkpointed and plan.unknown:
            raise CheckpointedRegion(record.where, features)
    owned = _owned(plan, (*plan.marks, *marks, *plan.records))
    if plan.loose:
        plan = plan.pruned(owned)
    _touch(plan, context.demand)
    with torch.no_grad():
        count, found = _probe(plan, start, samples, () if owned else _ordered(plan, context.demand))
        if owned:
            mixed = first_raised(found.flags)
            if mixed is not None:
                raise mixed
            plan = resolve(plan, found, owned)
            _refuse_undefined(plan, context)
            _warn_of_cost(plan)
            ordered = _ordered(plan, context.demand)
            if ordered:
                found = Probe(plan, start, count, ordered).run()
    _refuse_blocks(plan, context.demand)
    _refuse_kinds(plan, context.demand)
    asked = estimate.check(plan, context.demand, count, sum(map(prod, start.values())) // max(count, 1))
    return plan, count, found, count == samples[0] and not (asked or found.asked or found.flags)


def _ordered(plan: Plan, demand: Demand) -> Collection[Node]:
    """The nodes that must have the samples outermost."""
    sources = demand.sources(plan.definitions)
    if AVERAGED in sources:
        return plan.nodes
    if RESIDUAL in sources:
        again = {step.node for step in plan.unknown if not all(call.linear for call in step.calls)} & plan.reused
        return again | {step.node for step in plan.unknown if not is_linear(step)}
    return ()


def _probe(
    plan: Plan, start: Mapping[Edge, Sequence[int]], samples: Sequence[int], also: Container[Node]
) -> tuple[int, Found]:
    """The first of the numbers of samples with which no samples mix; one that the loss does not say must be of first axes."""
    *others, last = samples
    for count in others:
        try:
            found = Probe(plan, start, count, also).run()
        except SatchelError:
            continue
        if plan.records[0].batch.outer == 1 and first_raised(found.flags) is None:
            return count, found
    return last, Probe(plan, start, last, also).run()


def _touch(plan: Plan, demand: Demand) -> None:
    """Refuse a tensor that was overwritten, where a rule will read it."""
    for step in plan.steps:
        if step.record is not None:
            for operand in reads(step, demand):
                step.record.touch(operand)


def _owned(plan: Plan, marks: Sequence[Mark]) -> dict[int, Owned]:
    """The parameters that nodes use and that belong to an extended module, with the innermost one."""
    found: dict[int, Owned] = {}
    loose = {id(parameter) for _, parameter in plan.loose}
    if not loose:
        return found
    for mark in marks:
        module = mark.module()
        for name, parameter in () if module is None else module.named_parameters(remove_duplicate=False):
            before = found.get(id(parameter))
            if id(parameter) in loose and (before is None or name.count(".") < before.name.count(".")):
                found[id(parameter)] = Owned(mark, name)
    return found


def _refuse_undefined(plan: Plan, context: backpack) -> None:
    """Refuse, or warn of, features that the uses of a parameter by nodes have no value for."""
    supported = [layer.name for layer in registry().layers]
    for step in plan.steps:
        if step.record is None and step.calls and has_sparse_gradient(step.node):
            raise SparseGradient(step.calls[0].record.where, context.demand.names)
    for call in plan.calls:
        record = call.record
        if not isinstance(record, NodeRecord):
            continue
        for name in call.parameters:
            serving = context.demand.serving(record.definition, name)
            lacking = [e.name for e in context.demand.extensions if e not in serving]
            if lacking:
                error = UnsupportedModule(record.owner, record.parameter_name, record.node_name, lacking, supported)
                if context.strict:
                    raise error
                warnings.warn(str(error), stacklevel=2)


def _refuse_blocks(plan: Plan, demand: Demand) -> None:
    """Refuse the exact curvature of a parameter that is too large for it."""
    limit = current().matrix_bytes
    for use in (place.use for places in plan.uses.values() for place in places):
        asking = demand.extensions if use.offers(BLOCK) else ()
        features = [extension.name for extension in asking if demand.asks(extension, use.layer, BLOCK)]
        if features and use.block_bytes() > limit:
            where = f"{use.record.where}, the exact block of {use.record.called(use.name)!r}"
            raise MemoryLimit(features, where, use.block_bytes(), limit)


def _refuse_kinds(plan: Plan, demand: Demand) -> None:
    """Of uses that have no Kronecker structure in common, only what individual pullbacks give is defined."""
    for places in plan.tied.values():
        uses = [place.use for place in places]
        if alike(uses):
            continue
        for extension in demand.extensions:
            needs = [(use, need) for use in uses for _, need in demand.asked(extension, use.layer)]
            asked = {need.quantity for use, need in needs if use.offers(need.quantity)}
            factors = sorted(asked & registry().factors)
            if factors and all(extension in demand.serving(use.layer, use.name) for use in uses):
                raise SharedByKinds([use.record.where for use in uses], uses[0].name, factors[0], [extension.name])


def _warn_of_cost(plan: Plan) -> None:
    """Say once for each parameter that its uses cost N backwards of a node."""
    for step in plan.steps:
        for call in step.calls:
            where = call.record.where
            if isinstance(call, Pullback) and where not in _warned:
                _warned.add(where)
                text = f"{where}: no definition covers this use, so the node's backward runs once for every sample"
                warnings.warn(text, stacklevel=2)


_warned: set[str] = set()
