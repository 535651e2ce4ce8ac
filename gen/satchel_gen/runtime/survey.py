"""Refuses, at the walk, what would give a wrong number: before any field is overwritten."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch.autograd.graph import Node

from .axes import canonical_shape
from .context import backpack
from .curvature import AVERAGED, RESIDUAL, refuse_option
from .demand import CURVATURE, SECOND_ORDER, Demand
from .errors import BatchAxisLost, CheckpointedRegion, UnsupportedModule
from .flags import Flag, first_raised
from .plan import LooseParameter, Plan
from .probe import mixing
from .record import Edge, Mark
from .rules import registry
from .second import is_linear
from .torch_private import is_python_function, is_reentrant_checkpoint


def check(
    plan: Plan, context: backpack, start: Mapping[Edge, Sequence[int]], samples: int | None, marks: Iterable[Mark] = ()
) -> list[Flag]:
    """Refuse the plan, or return what its tensors have to tell at the end. `marks` are modules above the plan."""
    features = context.demand.names
    for node in plan.nodes:
        if is_python_function(node) and is_reentrant_checkpoint(node):
            raise CheckpointedRegion(node.name(), features)
    for record in plan.records:
        layer = record.definition
        for option, supported in layer.options.items():
            refuse_option(record.where, option, record.options[option], supported, features)
        if record.checkpointed and plan.unknown:
            raise CheckpointedRegion(record.where, features)
        expected = samples if samples is not None else plan.records[0].samples if plan.records[0].output_shape else None
        for axes, shape in ((layer.input_axes, record.input_shape), (layer.output_axes, record.output_shape)):
            if canonical_shape(axes, shape) is None or not shape or shape[0] != expected:
                raise BatchAxisLost(record.where, shape, expected)
    _touch(plan, context.demand)
    flags: list[Flag] = []
    if plan.records:
        sources = context.demand.sources(record.definition for record in plan.records)
        also: Container[Node] = ()  # nodes that must have the samples outermost
        if AVERAGED in sources:
            also = plan.nodes
        elif RESIDUAL in sources:
            also = {step.node for step in plan.unknown if not is_linear(step)}
        with torch.no_grad():
            flags = mixing(plan, start, plan.records[0].samples, also)
    loose = _owned(plan.loose, (*plan.marks, *marks, *plan.records))
    if loose:
        mixed = first_raised(flags)  # why a batch normalisation in training mode can have no definition
        if mixed is not None:
            raise mixed
        _refuse_loose(loose, context)
    return flags


def _touch(plan: Plan, demand: Demand) -> None:
    """Refuse a tensor that was overwritten, where a rule will read it."""
    for step in plan.steps:
        if step.record is None:
            continue
        layer = step.record.definition
        needed = demand.of(layer)
        kinds = {source.kind for source in needed}
        names = {name for quantities in needed.values() for name in quantities}
        rules = [rule for p in step.parameters for name, rule in layer.parameters[p].items() if name in names]
        if step.inputs and kinds & set(CURVATURE):
            rules += layer.passes if kinds & set(SECOND_ORDER) else [layer.vjp]
        for operand in {operand for rule in rules for operand in rule.operands}:
            step.record.operand(operand)


def _owned(loose: Sequence[LooseParameter], marks: Sequence[Mark]) -> list[tuple[LooseParameter, Mark, str]]:
    """The loose parameters that belong to an extended module, with the innermost one and the parameter's name there."""
    found = []
    for one in loose:
        owners = []
        for mark in marks:
            module = mark.module()
            named = () if module is None else module.named_parameters(remove_duplicate=False)
            owners += [(name.count("."), name, mark) for name, parameter in named if parameter is one.parameter]
        if owners:
            _, name, mark = min(owners, key=lambda owner: owner[0])
            found.append((one, mark, name))
    return found


def _refuse_loose(loose: list[tuple[LooseParameter, Mark, str]], context: backpack) -> None:
    supported = [layer.name for layer in registry().layers]
    errors = [
        UnsupportedModule(mark.where, name, one.node.name(), context.demand.names, supported)
        for one, mark, name in loose
    ]
    if context.strict:
        raise errors[0]
    for error in errors:
        warnings.warn(str(error), stacklevel=2)
