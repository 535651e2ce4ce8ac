"""The structure of a graph as a value: of passes over graphs of one structure, the first alone is walked in full and surveyed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from torch import get_default_dtype
from torch.autograd.graph import Node

from .demand import SECOND_ORDER, Demand
from .geometry import Geometry
from .lazy import lazy
from .plan import Place, Plan, Step, by_rules
from .record import Edge, Record, entries
from .rules import Layer
from .settings import current
from .torch_private import ACCUMULATOR, axis_structure, leaf_of, node_output_shapes
from .wanted import Wanted

#: Structures that are remembered for a set of features: sequences may have any length.
_MOST = 256


class Outline(NamedTuple):
    """A graph's structure, and its nodes and the calls of layers in the order in which they were met."""

    key: tuple[Hashable, ...]
    nodes: list[Node]
    records: list[Record]


def outline(
    start: Mapping[Edge, Sequence[int]], wanted: Wanted, samples: int | None, below_loss: bool
) -> Outline | None:
    """All that a survey reads of the graph below some edges; None where it reads more: values, or nodes that use parameters.

    samples: N, where another loss has said it. below_loss: whether the edges are those of an extended loss.
    """
    nodes: list[Node] = []
    places: dict[Node, int] = {}
    parameters: dict[int, int] = {}
    records: list[Record] = []
    key: list[Hashable] = [current().memory_limit, get_default_dtype(), samples, below_loss]
    for (node, number), shape in start.items():
        place = places.setdefault(node, len(nodes))
        if place == len(nodes):
            nodes.append(node)
        key += (place, number, tuple(shape))
    for node in nodes:  # which grows
        record = entries(node).record
        edges: Sequence[tuple[Node | None, int]]
        if record is None:
            axes = axis_structure(node)
            if axes is None:
                return None
            edges = node.next_functions
            key += (axes, *node_output_shapes(node), len(edges))  # shapes of inputs are those of the outputs below
        else:
            records.append(record)
            edges = record.edges
            key += (type(node), *record.structure, len(edges))
            for name, p in wanted.of(record, node).items():
                key += (name, parameters.setdefault(id(p), len(parameters)), p.shape, p.dtype)
        for below, number in edges:
            if below is None:
                key.append(None)
            elif type(below) is ACCUMULATOR:
                if record is None and (leaf := leaf_of(below)) is not None and leaf in wanted:
                    return None
                key.append(None)
            else:
                found = places.get(below)
                if found is None:
                    found = places[below] = len(nodes)
                    nodes.append(below)
                key += (found, number)
    return Outline(tuple(key), nodes, records)


class Surveyed(NamedTuple):
    """What the first pass has found, by the places of nodes and of records in the outline.

    layers: where each layer has its axes, and the operands that its rules read. steps: the plan's, with their inputs.
    """

    samples: int
    layers: tuple[tuple[int, Geometry, tuple[str, ...]], ...]
    steps: tuple[tuple[int, tuple[tuple[int, int, int], ...]], ...]
    definitions: tuple[Layer, ...]
    tied: bool


class Recognised(Plan):
    """The plan of a graph whose structure has been surveyed. Its steps are made when a sweep asks for them."""

    def __init__(self, start: Iterable[Edge], outline: Outline, surveyed: Surveyed, wanted: Wanted) -> None:
        self.start, self.nodes, self.marks = tuple(start), frozenset(outline.nodes), ()
        self.surveyed, self._outline, self._wanted = surveyed, outline, wanted

    def recall(self) -> int:
        """Say where each layer has the batch; refuse what was overwritten since. N."""
        for place, geometry, operands in self.surveyed.layers:
            record = self._outline.records[place]
            record.geometry = geometry
            for operand in operands:
                record.touch(operand)
        return self.surveyed.samples

    @lazy
    def steps(self) -> tuple[Step, ...]:  # type: ignore[override]  # given to other plans
        nodes, found = self._outline.nodes, []
        for place, below in self.surveyed.steps:
            node = nodes[place]
            record = entries(node).record
            used = None if record is None else self._wanted.of(record)
            inputs = tuple([(position, (nodes[at], number)) for position, at, number in below])
            found.append(Step(node, record, inputs, by_rules(record, used)))
        return tuple(found)

    @lazy
    def definitions(self) -> tuple[Layer, ...]:
        return self.surveyed.definitions

    @lazy
    def called(self) -> tuple[Step, ...]:
        return ()

    @lazy
    def parameters(self) -> Mapping[int, Record]:
        layers = [(record, self._wanted.of(record)) for record in self._outline.records]
        return {id(parameter): record for record, used in layers for parameter in used.values()}

    @lazy
    def tied(self) -> Mapping[int, list[Place]]:
        return super().tied if self.surveyed.tied else {}


def reads(step: Step, demand: Demand) -> tuple[str, ...]:
    """The operands that the rules of a layer's step will read, of those that may have been overwritten."""
    assert step.record is not None
    own = tuple([parameter for call in step.calls for parameter in call.parameters])
    operands = demand.reads(step.record.definition, own, bool(step.inputs))
    return tuple(sorted(filter(step.record.may_change, operands)))


def recognised(
    start: Iterable[Edge], outline: Outline, wanted: Wanted, surveys: Mapping[Hashable, Surveyed]
) -> Recognised | None:
    """The plan, if a graph of its structure has been surveyed."""
    try:
        known = surveys.get(outline.key)
    except TypeError:  # a module's option that is no value, as a list
        return None
    return None if known is None else Recognised(start, outline, known, wanted)


def remember(plan: Plan, outline: Outline, samples: int, demand: Demand) -> None:
    """Keep what a survey has found, if the same would come of every graph of the structure."""
    surveys: MutableMapping[Hashable, Surveyed] = demand.surveyed
    sources = demand.sources(plan.definitions)
    if plan.unknown and any(source.kind in SECOND_ORDER for source in sources):  # nodes have second derivatives
        return
    nodes = {node: place for place, node in enumerate(outline.nodes)}
    records = {record: place for place, record in enumerate(outline.records)}
    layers, steps = [], []
    for step in plan.steps:
        steps.append((nodes[step.node], tuple([(at, nodes[below], number) for at, (below, number) in step.inputs])))
        if step.record is not None:
            layers.append((records[step.record], step.record.geometry, reads(step, demand)))
    if len(surveys) >= _MOST:
        surveys.clear()
    with suppress(TypeError):
        surveys[outline.key] = Surveyed(samples, tuple(layers), tuple(steps), plan.definitions, bool(plan.tied))
