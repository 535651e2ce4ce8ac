"""The second derivative of a node, Σ_y δ_y ∂²y/∂x∂x′ over all its inputs together: by the rules of an operation's definition, or by
its own backward.

Called with grad mode on, a node returns its inputs' gradients as functions of what it saved: its inputs, and its outputs,
which lead back to the node itself. The graph of that is small, and is passed here node by node, ending at the edges that the node
takes its inputs from. Autograd's engine would go on from one of these to another that lies above it, as in x * relu(x), and would
run hooks on the way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .errors import NodeFailed
from .operations import Applied, applied
from .passing import call, pull
from .plan import Step
from .record import Edge
from .sweep import add, take
from .torch_private import is_accumulator, leaf_of, node_outputs


class Refused(Exception):
    """A node whose backward autograd cannot differentiate."""


class SecondDerivative(ABC):
    """tangents v [V, *edge] by edge → Σ_y δ_y ∂²y/∂x∂x′ v [V, *edge] by edge."""

    def __init__(self, step: Step) -> None:
        self.edges = tuple(dict.fromkeys(edge for _, edge in step.inputs))

    @abstractmethod
    def __call__(self, tangents: Mapping[Edge, Tensor]) -> dict[Edge, Tensor]: ...


class OfOperation(SecondDerivative):
    """By the rules of a definition."""

    def __init__(self, step: Step, operation: Applied, delta: Tensor) -> None:
        super().__init__(step)
        self._inputs, self._operation, self._delta = step.inputs, operation, delta

    def __call__(self, tangents: Mapping[Edge, Tensor]) -> dict[Edge, Tensor]:
        by_position = {position: tangents[edge] for position, edge in self._inputs}
        found: dict[Edge, Tensor] = {}
        for position, edge in self._inputs:
            add(found, {edge: self._operation.hessian(position, self._delta, by_position)})
        return found


class Traced(SecondDerivative):
    """By the graph of the node's backward."""

    def __init__(self, step: Step, starts: list[tuple[Edge, Edge]], steps: list[Step]) -> None:
        super().__init__(step)
        self._starts, self._steps = starts, steps

    def __call__(self, tangents: Mapping[Edge, Tensor]) -> dict[Edge, Tensor]:
        live: dict[Edge, Tensor] = {}
        for edge, start in self._starts:
            add(live, {start: tangents[edge]})
        for step in self._steps:
            columns = take(live, step)
            if columns:
                add(live, pull(step, columns))
        return {edge: live[edge] if edge in live else torch.zeros_like(tangents[edge]) for edge in self.edges}


def second_derivative(step: Step, deltas: Mapping[int, Tensor]) -> SecondDerivative | None:
    """Of Σ δ y, δ [*output] by output number; None where it is zero because the node's backward depends on δ alone.

    Raises Refused.
    """
    if step.linear:
        return None
    operation = applied(step.node, [position for position, _ in step.inputs])
    if operation is not None:
        return OfOperation(step, operation, deltas[0])
    # δ requires grad: a backward that refuses to be differentiated says so only then.
    leaves = {number: delta.detach().requires_grad_() for number, delta in deltas.items()}
    with torch.enable_grad():
        try:
            gradients = call(step, leaves)
        except (RuntimeError, ValueError) as error:
            raise NodeFailed(step.where) from error
    ours = {id(leaf) for leaf in leaves.values()}
    ends = {(node, number) for node, number in step.node.next_functions if node is not None}
    wanted = {edge for _, edge in step.inputs}
    heads = [
        (edge, (gradient.grad_fn, gradient.output_nr))
        for (_, edge), gradient in zip(step.inputs, gradients, strict=True)
        if gradient.grad_fn is not None
    ]
    steps: dict[Node, Step] = {}
    for node in _postorder([head for _, head in heads], ends):
        if is_accumulator(node):
            if id(leaf_of(node)) not in ours:  # what stands for an error that is delayed until it is differentiated
                raise Refused
            continue
        following = [(k, (below, number)) for k, (below, number) in enumerate(node.next_functions) if below is not None]
        if not following:
            raise Refused
        inputs = tuple((k, edge) for k, edge in following if edge in wanted or edge[0] in steps)
        if inputs:
            steps[node] = Step(node, None, inputs)
    starts = [(edge, head) for edge, head in heads if head in wanted or head[0] in steps]
    return Traced(step, starts, [*reversed(steps.values())]) if starts else None


def _postorder(roots: list[Edge], ends: set[Edge]) -> list[Node]:
    """Every node below `roots` and above `ends`, after all that lie below it."""
    order: dict[Node, None] = {}
    entered: set[Node] = set()
    stack = [(node, False) for node, number in reversed(roots) if (node, number) not in ends]
    while stack:
        node, done = stack.pop()
        if done:
            order[node] = None
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack += [
                (below, False)
                for below, number in node.next_functions
                if below is not None and (below, number) not in ends
            ]
    return list(order)


def is_linear(step: Step) -> bool:
    """Whether the backward of a node depends on nothing that was differentiated: found by asking autograd, not by a list."""
    try:
        return second_derivative(step, _ones(step)) is None
    except Refused:
        return False


def is_twice_differentiable(step: Step) -> bool:
    """Found by trying: some derivatives refuse only when they are called."""
    try:
        derivative = second_derivative(step, _ones(step))
        if derivative is not None:
            derivative({edge: _one(edge)[None] for edge in derivative.edges})
    except (Refused, NodeFailed):
        return False
    return True


def _ones(step: Step) -> dict[int, Tensor]:
    return {edge[1]: _one(edge) for edge in step.outputs}


def _one(edge: Edge) -> Tensor:
    shape, dtype, device = node_outputs(edge[0])[edge[1]]
    return torch.ones(shape, dtype=dtype, device=device)
