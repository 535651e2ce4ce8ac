"""The walk: from an edge of the autograd graph down to the parameters, to an immutable plan of what must be passed where."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

from .calls import ByRules, Call
from .lazy import lazy
from .record import Edge, Entries, Mark, Record, entries
from .rules import Layer
from .torch_private import ACCUMULATOR, is_accumulator, leaf_of, node_output_count, node_output_shape
from .uses import Use
from .wanted import Wanted


@dataclass(eq=False)
class Step:
    """A node that something needed lies below: a call of a layer, or a node that passes a factor by its own backward."""

    node: Node
    record: Record | None
    #: Position among the gradients that the node returns, and the edge, of each input that leads to a wanted parameter.
    inputs: tuple[tuple[int, Edge], ...]
    #: How it uses wanted parameters; of a node without record, once its leaves are resolved.
    calls: tuple[Call, ...] = ()
    #: Position and edge of the inputs of a node without record that are wanted parameters.
    leaves: tuple[tuple[int, Edge, Tensor], ...] = ()

    @property
    def name(self) -> str:
        return self.node.name()

    @lazy
    def outputs(self) -> tuple[Edge, ...]:
        return tuple([(self.node, number) for number in range(node_output_count(self.node))])

    @property
    def linear(self) -> bool:
        """Whether a module that is known to be piecewise linear made the node."""
        return any(isinstance(entry, Mark) and entry.linear for entry in entries(self.node))

    @property
    def where(self) -> str:
        """The node and the modules that it belongs to, for errors."""
        marks = [entry.where for entry in entries(self.node) if type(entry) is Mark]
        return f"{self.name} ({', '.join(marks)})" if marks else self.name

    @property
    def apart(self) -> bool:
        """Whether no two calls use one parameter."""
        return _apart(self.calls)


def _apart(calls: Iterable[Call]) -> bool:
    used = [id(parameter) for call in calls for parameter in call.parameters.values()]
    return len(set(used)) == len(used)


class Place(NamedTuple):
    """A use of a parameter."""

    step: Step
    call: Call
    name: str

    @property
    def parameter(self) -> Tensor:
        return self.call.parameters[self.name]

    @property
    def layer(self) -> Layer:
        return self.call.record.definition

    def offers(self, quantity: str) -> bool:
        return quantity in self.layer.parameters[self.name]

    @property
    def use(self) -> Use:
        return Use(self.call.record, self.name)


@dataclass(eq=False)
class Plan:
    """Steps in topological order: a node comes after all its consumers."""

    start: tuple[Edge, ...]
    steps: tuple[Step, ...]
    nodes: frozenset[Node]
    marks: tuple[Mark, ...]

    @lazy
    def records(self) -> tuple[Record, ...]:
        """The calls of layers."""
        return tuple([step.record for step in self.steps if step.record is not None])

    @lazy
    def calls(self) -> tuple[Call, ...]:
        """Whatever uses wanted parameters by rules."""
        return tuple([call for step in self.steps for call in step.calls])

    @lazy
    def definitions(self) -> tuple[Layer, ...]:
        """Each once."""
        records = [*self.records, *(call.record for call in self.calls)]
        return tuple(dict.fromkeys([record.definition for record in records]))

    @property
    def loose(self) -> tuple[tuple[Step, Tensor], ...]:
        """The wanted parameters that nodes without record use."""
        return tuple([(step, leaf) for step in self.steps for _, _, leaf in step.leaves])

    @lazy
    def unknown(self) -> tuple[Step, ...]:
        """The nodes that pass factors by their own backward."""
        return tuple([step for step in self.steps if step.record is None])

    @property
    def called(self) -> tuple[Step, ...]:
        """Those of them that use wanted parameters."""
        return tuple([step for step in self.unknown if step.calls])

    @property
    def parameters(self) -> Mapping[int, Record]:
        """A call that uses it, for each wanted parameter by its id."""
        return {id(parameter): call.record for call in self.calls for parameter in call.parameters.values()}

    @lazy
    def uses(self) -> Mapping[int, list[Place]]:
        """The uses of each wanted parameter, by its id."""
        found: dict[int, list[Place]] = {}
        for step in self.steps:
            for call in step.calls:
                for name, parameter in call.parameters.items():
                    found.setdefault(id(parameter), []).append(Place(step, call, name))
        return found

    @lazy
    def tied(self) -> Mapping[int, list[Place]]:
        """Those of the parameters that have several."""
        if _apart(self.calls):
            return {}
        return {key: places for key, places in self.uses.items() if len(places) > 1}

    @lazy
    def shared(self) -> frozenset[Node]:
        """Layers with a parameter that has other uses: squares are taken of the sum over the uses that a column reaches."""
        return frozenset(place.step.node for places in self.tied.values() for place in places)

    @lazy
    def reused(self) -> frozenset[Node]:
        """Those with another use below, which what comes from above reaches, too."""
        uses = [{place.step.node for place in places} for places in self.tied.values()]
        return frozenset(node for nodes in uses for node in nodes if not self.below(node).isdisjoint(nodes))

    @lazy
    def _by_node(self) -> Mapping[Node, Step]:
        return {step.node: step for step in self.steps}

    def below(self, node: Node) -> set[Node]:
        """The nodes that the output of `node` is computed from."""
        found: set[Node] = set()
        stack = [node]
        while stack:
            following = {edge[0] for _, edge in self._by_node[stack.pop()].inputs} - found
            found |= following
            stack += following
        return found

    def pruned(self, keep: Container[int] = ()) -> Plan:
        """Without nodes that lead to no use; of the parameters that nodes use, only those of the ids in `keep`."""
        alive: dict[Node, Step] = {}
        for step in reversed(self.steps):
            inputs = tuple((position, edge) for position, edge in step.inputs if edge[0] in alive)
            leaves = tuple(leaf for leaf in step.leaves if id(leaf[2]) in keep)
            if inputs or leaves or step.calls:
                alive[step.node] = replace(step, inputs=inputs, leaves=leaves)
        return replace(self, steps=tuple(reversed(alive.values())))

    def column_bytes(self, itemsize: int) -> int:
        """The most that one column of a factor holds at any time while it is swept."""
        live = {edge: _numel(edge) for edge in self.start}
        most = sum(live.values())
        for step in self.steps:
            live.update({edge: _numel(edge) for _, edge in step.inputs})
            most = max(most, sum(live.values()) + sum(call.factor_size for call in step.calls))
            for edge in step.outputs:
                live.pop(edge, None)
        return most * itemsize


def _numel(edge: Edge) -> int:
    node, output_nr = edge
    return prod(node_output_shape(node, output_nr))


def by_rules(record: Record | None, parameters: Mapping[str, Tensor] | None) -> tuple[Call, ...]:
    """How a layer's step uses wanted parameters."""
    return (ByRules(record, parameters),) if record is not None and parameters else ()


def walk(start: Iterable[Edge], wanted: Wanted) -> Plan:
    """The plan of everything below `start`, each node after all that lie below it. No recursion: graphs are deep.

    The inside of a recorded layer is not entered: its rules stand for it.
    """
    start = tuple(start)
    nodes: set[Node] = set()
    steps: dict[Node, Step] = {}
    marks: list[Mark] = []
    stack: list[Node | None] = [node for node, _ in reversed(start) if not is_accumulator(node)]
    entered: list[tuple[Node, Entries]] = []
    while stack:
        above = stack.pop()
        if above in nodes:
            continue
        if above is not None:
            nodes.add(above)
            left = entries(above)
            entered.append((above, left))
            stack.append(None)  # comes up again when all below has been left
            for below, _ in above.next_functions if left.record is None else left.record.edges:
                if below is not None and below not in nodes and type(below) is not ACCUMULATOR:
                    stack.append(below)
            continue
        node, left = entered.pop()
        record = left.record
        if left:
            marks += [entry for entry in left if type(entry) is Mark]
        inputs, leaves = [], []
        for position, (below, number) in enumerate(node.next_functions if record is None else record.edges):
            if below is not None and below in steps:
                inputs.append((position, (below, number)))
            elif record is None and type(below) is ACCUMULATOR:
                leaf = leaf_of(below)
                if leaf is not None and leaf in wanted:
                    leaves.append((position, (below, number), leaf))
        parameters = None if record is None else wanted.of(record, node)
        if inputs or leaves or parameters:
            steps[node] = Step(node, record, tuple(inputs), by_rules(record, parameters), tuple(leaves))
    return Plan(start, tuple(reversed(steps.values())), frozenset(nodes), tuple(marks))
