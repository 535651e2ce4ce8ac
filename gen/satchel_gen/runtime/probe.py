"""Samples must not mix: found by passing columns that are each supported on half of them.

For every binary digit of a sample's number there is a column on the samples that have it and one on those that have not, so
any two samples are told apart, in both directions. Whatever lies between two recorded layers must keep the supports; the rules
of a layer do by construction, so the probe starts afresh at the input of each. The verdicts are tensors, read once when the pass ends.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .errors import SamplesMixed
from .flags import Flag
from .passing import edge_shape, pull
from .plan import Plan
from .record import Edge
from .sweep import add, take
from .torch_private import node_outputs


def mixing(plan: Plan, start: Mapping[Edge, Sequence[int]], samples: int, also: Container[Node] = ()) -> list[Flag]:
    """Flags that are true where samples mix, each with its error; checked at layers, and above and below the nodes in `also`.

    `start` gives the shapes in which the first axis is the batch, or the batch joined with positions.
    """
    if samples < 2 or not plan.unknown:
        return []
    live: dict[Edge, Tensor] = {}
    origin: dict[Edge, tuple[str, ...]] = {}
    flags: list[Flag] = []
    needed = {step.node for step in plan.steps}
    for edge, shape in start.items():
        if edge[0] in needed:
            _start(live, edge, shape, samples)
    for step in plan.steps:
        columns = take(live, step)
        passed_by = tuple(dict.fromkeys(name for number in columns for name in origin.get((step.node, number), ())))
        if passed_by and (step.record is not None or step.node in also):
            above = f"{' → '.join(passed_by)}, above {step.where if step.record is None else step.record.where}"
            flags += [(_leaves_support(arrived, samples), SamplesMixed(above)) for arrived in columns.values()]
        if step.record is None:
            if columns:
                passed = pull(step, columns)
                if step.node in also:
                    flags += [(_leaves_support(below, samples), SamplesMixed(step.where)) for below in passed.values()]
                add(live, passed)
                for _, edge in step.inputs:
                    origin[edge] = (*origin.get(edge, ()), *passed_by, step.name)
            continue
        for _, edge in step.inputs:
            _start(live, edge, step.record.input_shape, samples)
    return flags


def _start(live: dict[Edge, Tensor], edge: Edge, shape: Sequence[int], samples: int) -> None:
    """Put the columns on their samples, where the first axis is the batch. Not constant ones: a softmax would pass zero."""
    if not shape or shape[0] % samples:
        return
    node, output_nr = edge
    _, dtype, device = node_outputs(node)[output_nr]
    row = torch.linspace(0.5, 1.5, prod(shape) // samples, dtype=dtype, device=device)
    columns = _supports(samples, device)[:, :, None] * row
    add(live, {edge: columns.reshape(len(columns), *edge_shape(edge))})


def _leaves_support(columns: Tensor, samples: int) -> Tensor:
    """Whether a column is non-zero on another sample than those it started on. Products 0 · inf say nothing."""
    if columns[0].numel() % samples:
        return torch.ones((), dtype=torch.bool, device=columns.device)
    rows = columns.reshape(len(columns), samples, -1)
    return rows.masked_fill(_supports(samples, columns.device)[:, :, None], 0).nan_to_num(nan=0.0).count_nonzero() > 0


def _supports(samples: int, device: torch.device) -> Tensor:
    """Which samples each column is on [columns, N]: those with a binary digit, then those without it."""
    digits = torch.arange((samples - 1).bit_length(), device=device)
    has = (torch.arange(samples, device=device) >> digits[:, None]) % 2 == 1
    return torch.cat([has, ~has])
