"""Samples must not mix: found by passing a column that is supported on a pseudo-random half of them.

Whatever lies between two recorded layers must keep the support; the rules of a layer do by construction, so the probe starts
afresh, full, at the input of each. The verdicts are tensors, read once when the pass ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from .errors import SamplesMixed
from .flags import Flag
from .passing import edge_shape, pull
from .plan import Plan
from .record import Edge
from .sweep import add, take
from .torch_private import node_outputs


def mixing(plan: Plan, start: Mapping[Edge, Sequence[int]], samples: int, everywhere: bool = False) -> list[Flag]:
    """Flags that are true where samples mix, each with its error; checked at layers, or `everywhere`.

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
        if passed_by and (everywhere or step.record is not None):
            above = f"{' → '.join(passed_by)}, above {step.where if step.record is None else step.record.where}"
            flags += [(_leaves_half(column, samples), SamplesMixed(above)) for column in columns.values()]
        if step.record is None:
            if columns:
                add(live, pull(step, columns))
                for _, edge in step.inputs:
                    origin[edge] = (*origin.get(edge, ()), *passed_by, step.name)
            continue
        for _, edge in step.inputs:
            _start(live, edge, step.record.input_shape, samples)
    return flags


def _start(live: dict[Edge, Tensor], edge: Edge, shape: Sequence[int], samples: int) -> None:
    """Put a column on half of the samples, where the first axis is the batch. Not a constant one: a softmax would pass zero."""
    if not shape or shape[0] % samples:
        return
    node, output_nr = edge
    _, dtype, device = node_outputs(node)[output_nr]
    row = torch.linspace(0.5, 1.5, prod(shape) // samples, dtype=dtype, device=device)
    column = _half(samples, device)[:, None] * row
    add(live, {edge: column.reshape(1, *edge_shape(edge))})


def _leaves_half(column: Tensor, samples: int) -> Tensor:
    """Whether a column is non-zero on another sample than those it started on. Products 0 · inf say nothing."""
    if column.numel() % samples:
        return torch.ones((), dtype=torch.bool, device=column.device)
    rows = column.reshape(samples, -1)
    return rows.masked_fill(_half(samples, column.device)[:, None], 0).nan_to_num(nan=0.0).count_nonzero() > 0


def _half(samples: int, device: torch.device) -> Tensor:
    """Which samples are in the support: the first and not the second, others by a multiplicative hash. No flip, shift or other
    regular permutation keeps the half."""
    n = torch.arange(samples, device=device)
    return (n * 2654435761 >> 16) % 2 == 0
