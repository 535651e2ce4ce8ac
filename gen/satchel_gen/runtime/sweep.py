"""A sweep passes the columns of a factor from edge to edge over a plan, and shows them to whatever uses wanted parameters.

Autograd runs a node after all its consumers, and so does a plan: what the consumers passed back is summed at their edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from .calls import Call
from .evaluate import evaluate, uses_kernel
from .memory import FRESH
from .passing import by_node, edge_shape, pull
from .plan import Plan, Step
from .record import Edge
from .torch_private import held_elsewhere, node_outputs

#: Bytes of columns at a step from which on fewer at a time are faster: they stay in cache, and `malloc` reuses their memory.
AT_ONCE = FRESH // 2
#: What rules compute in its own precision.
_WRITTEN = (torch.float32, torch.float64)
#: Elements of a column for which a call of its own costs little.
_LARGE = 1 << 16


def sweep(
    plan: Plan, start: Mapping[Edge, Tensor], visit: Callable[[Call, Tensor], None], at_once: int | None = None
) -> None:
    """Pass columns [V, *edge] from the edges of `start`; `visit` gets whatever uses wanted parameters, and its factor.

    The columns are those of one space, so what arrives at an edge twice is summed. at_once: bytes; from a step on that would hold
    more, ranges of the columns are passed one after the other, each to the bottom.
    """
    _descend(plan, 0, dict(start), visit, at_once)


def _descend(
    plan: Plan,
    first: int,
    live: dict[Edge, Tensor],
    visit: Callable[[Call, Tensor], None],
    at_once: int | None,
) -> None:
    for number in range(first, len(plan.steps)):
        step = plan.steps[number]
        columns = take(live, step)
        if not columns:
            continue
        count = _fewer(step, columns, at_once)
        if count is not None:
            live |= {(step.node, output): factor for output, factor in columns.items()}
            for parts in zip(*(factor.split(count) for factor in live.values()), strict=True):
                _descend(plan, number, dict(zip(live, parts, strict=True)), visit, at_once)
            return
        for call in step.calls:
            visit(call, call.factor(columns))
        add(live, pass_step(step, columns, last=True))


def _fewer(step: Step, columns: Mapping[int, Tensor], at_once: int | None) -> int | None:
    """How many columns are to pass a step at a time, if these are too many."""
    some = next(iter(columns.values()))
    count = some.shape[0]
    if at_once is None or count < 2:
        return None
    edges = [*[(step.node, number) for number in columns], *[edge for _, edge in step.inputs]]
    each = sum([prod(edge_shape(edge)) for edge in edges]) * some.element_size()
    return None if count * each <= at_once else max(1, at_once // each)


def pass_step(step: Step, columns: dict[int, Tensor], last: bool = False) -> dict[Edge, Tensor]:
    """Columns [V, *output] by output number → Jᵀ of them [V, *input] by edge. last: nobody needs them again in `columns`."""
    record = step.record
    if not step.inputs:
        return {}
    if record is None:
        return pull(step, columns)
    layer = record.definition
    if layer.vjp is None:  # the input is not differentiable
        return {}
    # Detached from the tensor that it may be a view of, which would hold its memory.
    own = columns.pop(record.output_nr).detach() if last else columns[record.output_nr]
    if _is_slower(step, own) and (alone := by_node(step)) is not None:
        passed = _pass_node(alone, record.output_nr, own, layer.elementwise)
    else:
        spent = last and layer.vjp.writes and own.dtype in _WRITTEN and not held_elsewhere(own)
        factor = record.at_output(own, lead=1)
        passed = evaluate(layer.vjp, layer, record.operand, factor, out=factor if spent else None)
        passed = record.at_input(passed, lead=1)
    return {edge: at_edge(passed, edge, lead=1) for _, edge in step.inputs}


def _pass_node(step: Step, output_nr: int, columns: Tensor, elementwise: bool) -> Tensor:
    """Columns [V, *output] through a layer's node, [V, *input]: one by one, or by the slope that it makes of ones."""
    if not elementwise or len(columns) == 1:
        (passed,) = pull(step, {output_nr: columns}, columnwise=True).values()
        return passed
    (slope,) = pull(step, {output_nr: torch.ones_like(columns[:1])}).values()
    return columns.reshape(len(columns), *slope.shape[1:]) * slope


def _is_slower(step: Step, columns: Tensor) -> bool:
    """Whether a layer's rule is slower than a node of torch's, which takes one column of its own precision, in one operation."""
    record = step.record
    assert record is not None and record.definition.vjp is not None
    layer, rule = record.definition, record.definition.vjp
    if not rule.composed or columns.dtype not in _WRITTEN or uses_kernel(rule, [columns]):
        return False
    once = len(columns) == 1 or layer.elementwise
    return (once or columns[0].numel() >= _LARGE) and node_outputs(step.node)[record.output_nr][1] == columns.dtype


def chunks(factor: Tensor, size: int) -> Iterator[Tensor]:
    """Ranges of at most `size` columns."""
    return iter([factor] if factor.shape[0] <= size else factor.split(max(1, size)))


def take(live: dict[Edge, Tensor], step: Step) -> dict[int, Tensor]:
    """Remove what has arrived at a node, by output number."""
    return {edge[1]: live.pop(edge) for edge in step.outputs if edge in live}


def add(live: dict[Edge, Tensor], passed: Mapping[Edge, Tensor]) -> None:
    for edge, columns in passed.items():
        live[edge] = live[edge] + columns if edge in live else columns


def at_edge(tensor: Tensor, edge: Edge, lead: int) -> Tensor:
    """A layer's canonical input as the edge's gradient."""
    shape = edge_shape(edge)
    return tensor if tensor.shape[lead:] == shape else tensor.reshape(*tensor.shape[:lead], *shape)
