"""Samples must not mix: found by passing a column that is supported on sample 0.

Whatever lies between two recorded layers must keep the support; the rules of a layer do by construction, so the probe starts
afresh, full, at the input of each. The verdicts are tensors, read once when the pass ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import SatchelError, SamplesMixed
from .passing import edge_shape, pull
from .plan import Plan
from .record import Edge
from .sweep import add, take
from .torch_private import node_outputs


def mixing(plan: Plan, samples: int) -> list[tuple[Tensor, SatchelError]]:
    """Flags that are true where samples mix, each with its error."""
    if samples < 2 or not plan.unknown:
        return []
    live: dict[Edge, Tensor] = {}
    origin: dict[Edge, tuple[str, ...]] = {}
    flags: list[tuple[Tensor, SatchelError]] = []
    needed = {step.node for step in plan.steps}
    for edge in plan.start:
        if edge[0] in needed:
            _start(live, edge, samples)
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
            flags.append((others.count_nonzero() > 0, SamplesMixed(f"{' → '.join(passed_by)} above {step.record.where}")))
        for _, edge in step.inputs:
            _start(live, edge, samples)
    return flags


def _start(live: dict[Edge, Tensor], edge: Edge, samples: int) -> None:
    """Put a column of ones on sample 0, where the first axis is the batch."""
    node, output_nr = edge
    shape, dtype, device = node_outputs(node)[output_nr]
    if not _has_batch(shape, samples):
        return
    column = torch.zeros(1, *edge_shape(edge), dtype=dtype, device=device)
    column[0, 0] = 1
    add(live, {edge: column})


def _has_batch(shape: Sequence[int], samples: int) -> bool:
    return len(shape) > 0 and shape[0] == samples
