"""Refuses, at the walk, what would give a wrong number: before any field is overwritten."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch

from .axes import canonical_shape
from .context import backpack
from .curvature import Flag, refuse_option
from .errors import BatchAxisLost, CheckpointedRegion, SatchelError, UnsupportedModule
from .plan import LooseParameter, Plan
from .probe import mixing
from .record import Edge, Mark
from .rules import registry
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
    flags: list[Flag] = []
    if plan.records:
        with torch.no_grad():
            flags = mixing(plan, start, plan.records[0].samples)
    loose = _owned(plan.loose, (*plan.marks, *marks, *plan.records))
    if loose:
        mixed = first_raised(flags)  # why a batch normalisation in training mode can have no definition
        if mixed is not None:
            raise mixed
        _refuse_loose(loose, context)
    return flags


def first_raised(flags: Sequence[Flag]) -> SatchelError | None:
    """The error of the first flag that is true. Reads the device once."""
    if not flags:
        return None
    device = flags[0][0].device
    raised = torch.stack([flag.reshape(()).to(device) for flag, _ in flags]).tolist()
    return next((error for (_, error), true in zip(flags, raised, strict=True) if true), None)


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
