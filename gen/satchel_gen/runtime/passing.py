"""How a factor passes a node without a definition: by the node's own backward, all columns at once.

Does what autograd does around a node: absent gradients are None, a gradient takes the dtype of the output, and what comes
back is reduced to the shape of the input that was broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .errors import NodeFailed
from .plan import Step
from .record import Edge
from .rules import registry
from .torch_private import COLUMNWISE, RESHAPING, is_accumulator, is_python_function, node_output_shape, node_outputs


def by_node(step: Step) -> Step | None:
    """A layer's step without its rules, if one node computes the layer. Its edge is the node's own: that of the record is past reshapes.

    What else the node reads are leaves: a product of the input with what several nodes have made of it is no such node.
    """
    assert step.record is not None and step.record.edge is not None
    below = enumerate(step.node.next_functions)
    inputs = [(place, (node, nr)) for place, (node, nr) in below if node is not None and not is_accumulator(node)]
    if len(inputs) != 1 or _past_reshapes(*inputs[0][1]) != step.record.edge:
        return None
    return replace(step, record=None, inputs=tuple(inputs))


def _past_reshapes(node: Node | None, number: int) -> tuple[Node | None, int]:
    while node is not None and type(node).__name__ in RESHAPING:
        ((node, number),) = node.next_functions
    return node, number


def pull(step: Step, columns: Mapping[int, Tensor], columnwise: bool = False) -> dict[Edge, Tensor]:
    """Columns [V, *output] by output number → columns [V, *input] by edge. columnwise: not by vmap."""
    count = next(iter(columns.values())).shape[0]
    fused = step.name in registry().by_node  # such kernels take one column
    columnwise = columnwise or fused or count <= 1 or step.name in COLUMNWISE
    try:
        passed = _one_by_one(step, columns, count) if columnwise else _all_at_once(step, columns, count)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise NodeFailed(step.name) from error
    return _by_edge(step, passed)


def _all_at_once(step: Step, columns: Mapping[int, Tensor], count: int) -> Sequence[Tensor]:
    """By vmap; one by one where an operation has no batching rule."""

    def one(*column: Tensor) -> tuple[Tensor, ...]:
        return call(step, dict(zip(columns, column, strict=True)))

    try:
        return torch.vmap(one)(*columns.values())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        return _one_by_one(step, columns, count)


def _one_by_one(step: Step, columns: Mapping[int, Tensor], count: int) -> Sequence[Tensor]:
    if count == 0:
        like = next(iter(columns.values()))
        return [like.new_zeros(0, *edge_shape(edge)) for _, edge in step.inputs]
    results = [call(step, {number: factor[v] for number, factor in columns.items()}) for v in range(count)]
    if count == 1:
        return [passed[None] for passed in results[0]]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def _by_edge(step: Step, passed: Sequence[Tensor]) -> dict[Edge, Tensor]:
    """Sums what leads to the same edge: x + x."""
    found: dict[Edge, Tensor] = {}
    for (_, edge), columns in zip(step.inputs, passed, strict=True):
        found[edge] = found[edge] + columns if edge in found else columns
    return found


def call(step: Step, column: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
    """One column through the node's backward. Calling a node runs no hooks."""
    node, outputs = step.node, node_outputs(step.node)
    python = is_python_function(node)
    gradients: list[Tensor | None] = [None] * len(outputs)
    for number, (shape, dtype, device) in enumerate(outputs):
        if number in column:
            gradients[number] = column[number].to(dtype).reshape(shape)
        elif python:  # autograd gives a Function zeros where no gradient arrives
            gradients[number] = torch.zeros(shape, dtype=dtype, device=device)
    results = node.apply(*gradients) if python else node(*gradients)  # type: ignore[attr-defined, operator]
    results = results if isinstance(results, tuple) else (results,)
    any_column = next(iter(column.values()))
    return tuple(_fit(results[position], edge_shape(edge), any_column) for position, edge in step.inputs)


def _fit(result: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor:
    if result is None:
        return like.new_zeros(tuple(shape))
    return result if result.shape == torch.Size(shape) else result.sum_to_size(tuple(shape))


def edge_shape(edge: Edge) -> tuple[int, ...]:
    """Shape of the gradient that an edge carries."""
    node, output_nr = edge
    return node_output_shape(node, output_nr)


def features(shape: Sequence[int], samples: int) -> int:
    """Elements of one sample, where the samples are the outermost axis, alone or joined with others."""
    return prod(shape) // samples if samples else prod(shape[1:])
