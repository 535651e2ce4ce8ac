"""The walk: from an edge of the autograd graph down to the parameters, to an immutable plan of what must be passed where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import Tensor
from torch.autograd.graph import Node

from .record import Edge, Mark, Record, entries, layer_record
from .torch_private import is_accumulator, leaf_of, node_outputs


@dataclass(frozen=True)
class Step:
    """A node that something needed lies below: a call of a layer, or a node that passes a factor by its own backward."""

    node: Node
    record: Record | None
    #: Position among the gradients that the node returns, and the edge, of each input that leads to a wanted parameter.
    inputs: tuple[tuple[int, Edge], ...]
    #: The wanted parameters of the layer.
    parameters: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        return self.node.name()

    @property
    def where(self) -> str:
        """The node and the modules that it belongs to, for errors."""
        marks = [entry.where for entry in entries(self.node) if type(entry) is Mark]
        return f"{self.name} ({', '.join(marks)})" if marks else self.name


@dataclass(frozen=True)
class LooseParameter:
    """A wanted parameter that a node without a record uses."""

    parameter: Tensor
    node: Node


@dataclass(frozen=True)
class Plan:
    """Steps in topological order: a node comes after all its consumers."""

    start: tuple[Edge, ...]
    steps: tuple[Step, ...]
    nodes: frozenset[Node]
    loose: tuple[LooseParameter, ...]
    marks: tuple[Mark, ...]

    @cached_property
    def records(self) -> tuple[Record, ...]:
        return tuple(step.record for step in self.steps if step.record is not None)

    @cached_property
    def unknown(self) -> tuple[Step, ...]:
        """The nodes that pass factors by their own backward."""
        return tuple(step for step in self.steps if step.record is None)

    @cached_property
    def uses(self) -> Mapping[int, list[Step]]:
        """The steps that use each wanted parameter, by its id."""
        found: dict[int, list[Step]] = {}
        for step in self.steps:
            for parameter in step.parameters.values():
                found.setdefault(id(parameter), []).append(step)
        return found

    @cached_property
    def shared(self) -> frozenset[Node]:
        """Layers with a parameter that has other uses: squares are taken of the sum over the uses that a column reaches."""
        return frozenset(step.node for steps in self.uses.values() if len(steps) > 1 for step in steps)

    @cached_property
    def reused(self) -> frozenset[Node]:
        """Those with another use below, which what comes from above reaches, too."""
        uses = [{step.node for step in steps} for steps in self.uses.values() if len(steps) > 1]
        return frozenset(node for nodes in uses for node in nodes if not self.below(node).isdisjoint(nodes))

    def below(self, node: Node) -> set[Node]:
        """The nodes that the output of `node` is computed from."""
        by_node = {step.node: step for step in self.steps}
        found: set[Node] = set()
        stack = [node]
        while stack:
            following = {edge[0] for _, edge in by_node[stack.pop()].inputs} - found
            found |= following
            stack += following
        return found

    def column_bytes(self, itemsize: int) -> int:
        """The most that one column of a factor holds at any time while it is swept."""
        live = {edge: _numel(edge) for edge in self.start}
        most = sum(live.values())
        for step in self.steps:
            live.update({edge: _numel(edge) for _, edge in step.inputs})
            most = max(most, sum(live.values()))
            for edge in [edge for edge in live if edge[0] is step.node]:
                del live[edge]
        return most * itemsize


def _numel(edge: Edge) -> int:
    node, output_nr = edge
    return prod(node_outputs(node)[output_nr][0])


def walk(start: Iterable[Edge], wanted: Callable[[Tensor], bool]) -> Plan:
    """The plan of everything below `start`. The inside of a recorded layer is not entered: its rules stand for it."""
    start = tuple(start)
    order = _postorder([node for node, _ in start])
    steps: dict[Node, Step] = {}
    loose: list[LooseParameter] = []
    marks: list[Mark] = []
    for node in order:
        record = layer_record(node)
        marks += [entry for entry in entries(node) if type(entry) is Mark]
        parameters: dict[str, Tensor] = {}
        if record is not None:
            parameters = {name: parameter for name, parameter in record.trainable().items() if wanted(parameter)}
        else:
            leaves = [leaf_of(below) for below, _ in node.next_functions if below is not None]
            loose += [LooseParameter(leaf, node) for leaf in leaves if leaf is not None and wanted(leaf)]
        inputs = tuple((position, edge) for position, edge in _inputs(node, record) if edge[0] in steps)
        if inputs or parameters:
            steps[node] = Step(node, record, inputs, parameters)
    return Plan(start, tuple(reversed(steps.values())), frozenset(order), tuple(loose), tuple(marks))


def _inputs(node: Node, record: Record | None) -> list[tuple[int, Edge]]:
    """The edges that a factor takes from a node."""
    if record is not None:
        return [] if record.edge is None else [(0, record.edge)]
    following = enumerate(node.next_functions)
    return [(position, (below, output_nr)) for position, (below, output_nr) in following if below is not None]


def _postorder(roots: list[Node]) -> list[Node]:
    """Every node below `roots`, after all that lie below it. Accumulators are left out. No recursion: graphs are deep."""
    order: dict[Node, None] = {}
    entered: set[Node] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, done = stack.pop()
        if done:
            order[node] = None
        elif node not in entered and not is_accumulator(node):
            entered.add(node)
            stack.append((node, True))
            stack += [(below, False) for _, (below, _) in _inputs(node, layer_record(node))]
    return list(order)
