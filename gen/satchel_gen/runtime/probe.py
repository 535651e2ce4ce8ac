"""Samples must not mix: found by passing a column that is supported on sample 0.

Whatever lies between two recorded layers must keep the support; the rules of a layer do by construction, so the probe starts
afresh, full, at the input of each. The verdicts are tensors, read once when the pass ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from .errors import SamplesMixed, SatchelError
from .passing import edge_shape, pull
from .plan import Plan
from .record import Edge
from .sweep import add, take
from .torch_private import node_outputs


def mixing(plan: Plan, start: Mapping[Edge, Sequence[int]], samples: int) -> list[tuple[Tensor, SatchelError]]:
    """Flags that are true where samples mix, each with its error. `start` gives the shapes in which the first axis is the batch."""
    if samples < 2 or not plan.unknown:
        return []
    live: dict[Edge, Tensor] = {}
    origin: dict[Edge, tuple[str, ...]] = {}
    flags: list[tuple[Tensor, SatchelError]] = []
    needed = {step.node for step in plan.steps}
    for edge, shape in start.items():
        if edge[0] in needed:
            _start(live, edge, shape, samples)
    for step in plan.steps:
        columns = take(live, step)
        passed_by = tuple(dict.fromkeys(name for number in columns for name in origin.get((step.node, number), ())))
        if step.record is None:
            if columns:
                add(live, pull(step, columns))
                for _, edge in step.inputs:
                    origin[edge] = (*origin.get(edge, ()), *passed_by, step.name)
            continue
        if passed_by:
            found = columns[step.record.output_nr].reshape(step.record.output_shape)
            others = found[1:].nan_to_num(nan=0.0)  # 0 · inf says nothing about support
            flags.append(
                (others.count_nonzero() > 0, SamplesMixed(f"{' → '.join(passed_by)} above {step.record.where}"))
            )
        for _, edge in step.inputs:
            _start(live, edge, step.record.input_shape, samples)
    return flags


def _start(live: dict[Edge, Tensor], edge: Edge, shape: Sequence[int], samples: int) -> None:
    """Put a column on sample 0, where the first axis is the batch. Not a constant one: a softmax would pass zero."""
    if not shape or shape[0] != samples:
        return
    node, output_nr = edge
    _, dtype, device = node_outputs(node)[output_nr]
    column = torch.zeros(samples, prod(shape[1:]), dtype=dtype, device=device)
    column[0] = torch.linspace(0.5, 1.5, column.shape[1], device=device)
    add(live, {edge: column.reshape(1, *edge_shape(edge))})
