"""Which sample does an element belong to? Found by passing columns that are each supported on half of the samples.

For every binary digit of a sample's number there is a column on the samples that have it and one on those that have not, so
any two samples are told apart, in both directions. Whatever lies between two recorded layers must keep every element with one
sample; the rules of a layer do by construction, and so do nodes that are known to keep the first axis, where that is the batch:
columns start afresh below these, at the first node that must be asked. Where shapes leave one place for the batch, the verdict is
a tensor that is read once when the pass ends; otherwise the columns are read to find it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .axes import Batch, possible_batches
from .errors import BatchAxisLost, SamplesMixed
from .flags import Flag
from .passing import edge_shape, pull
from .plan import Plan, Step
from .record import Edge, Record
from .sweep import add, take
from .torch_private import RESHAPING, VIEWS, axis_before, node_outputs, normalised_shape


@dataclass
class Found:
    """What the probe has found: where samples mix (read at the end), and of each node without record, where its samples lie."""

    flags: list[Flag] = field(default_factory=list)
    #: Whether a node had to be asked by columns.
    asked: bool = False
    #: By output edge, where parameters are used by nodes: only there it is needed.
    batches: dict[Edge, Batch] = field(default_factory=dict)
    #: Nodes whose outputs belong to several samples at once, as what is computed from parameters alone does.
    shared: set[Node] = field(default_factory=set)


class Probe:
    """One walk of the columns over a plan. `start` gives the shapes in which the first axis is the batch, maybe joined with positions.

    also: nodes above and below which the batch must come first, as at layers.
    """

    def __init__(
        self, plan: Plan, start: Mapping[Edge, Sequence[int]], samples: int, also: Container[Node] = ()
    ) -> None:
        self.plan, self.samples, self.also = plan, samples, also
        self.found = Found(shared=_views_of_parameters(plan))
        #: Two samples can mix only between layers.
        self.probing = samples > 1 and bool(plan.unknown)
        self.locating = bool(plan.loose)
        self.nodes = {step.node for step in plan.steps}
        #: By edge, where the batch is known to be, as each consumer says; and columns, where a node above had to be asked.
        self.said: dict[Edge, set[Batch]] = {}
        self.live: dict[Edge, Tensor] = {}
        self.passed_by: dict[Edge, tuple[str, ...]] = {}
        for edge, shape in start.items():
            if shape and shape[0] % max(samples, 1) == 0:
                self._say(edge, Batch(samples))

    def run(self) -> Found:
        for step in self.plan.steps:
            if step.record is not None:
                self._layer(step, step.record)
            elif not self._known(step):
                columns = self._columns(step)
                if columns:
                    self._node(step, columns)
                elif self.samples < 2:  # one sample is everywhere
                    self.found.batches.update({edge: Batch(self.samples) for edge in step.outputs if self.locating})
        return self.found

    def _say(self, edge: Edge, batch: Batch) -> None:
        if edge[0] in self.nodes:
            self.said.setdefault(edge, set()).add(batch)

    def _batch(self, edge: Edge) -> Batch | None:
        """Where the batch is known to be; None where the columns must tell."""
        said = self.said.get(edge, set())
        return next(iter(said)) if len(said) == 1 and edge not in self.live else None

    def _known(self, step: Step) -> bool:
        """Pass on where the batch is, through a node of which it is known what it makes of it."""
        edges = [edge for edge in step.outputs if edge in self.said or edge in self.live]
        arrived = {edge: batch for edge in edges if (batch := self._batch(edge)) is not None}
        if not self.probing or step.node in self.found.shared or not arrived or len(arrived) < len(edges):
            return False
        before: dict[Edge, Batch] = {}
        for _, below in step.inputs:
            found = {self._before(step, below, edge, batch) for edge, batch in arrived.items()}
            (only,) = found if len(found) == 1 else (None,)
            if only is None:
                return False
            before[below] = only
        for edge, batch in arrived.items():
            self.said.pop(edge)
            if self.locating:
                self.found.batches[edge] = batch
        for below, batch in before.items():
            self._say(below, batch)
        return True

    def _before(self, step: Step, below: Edge, edge: Edge, batch: Batch) -> Batch | None:
        """Where the batch of an output is in an input."""
        before, after = edge_shape(below), edge_shape(edge)
        if prod(before) % self.samples or (step.node in self.also and batch.outer > 1):
            return None
        if step.name in RESHAPING:
            return batch
        for axis, extent in enumerate(after):
            if prod(after[:axis]) == batch.outer and extent % self.samples == 0:
                found = axis_before(step.node, axis, before, after)
                return None if found is None else Batch(self.samples, prod(before[:found]))
        return None

    def _columns(self, step: Step) -> dict[int, Tensor]:
        """The columns that have arrived at a node, or that start there."""
        for edge in step.outputs:
            for batch in self.said.get(edge, ()):
                add(self.live, self._start(edge, batch))
        return take(self.live, step)

    def _start(self, edge: Edge, batch: Batch) -> dict[Edge, Tensor]:
        """Columns on their samples. Not constant ones: a softmax would pass zero."""
        shape = edge_shape(edge)
        if not self.probing or prod(shape) % (batch.samples * batch.outer):
            return {}
        _, dtype, device = node_outputs(edge[0])[edge[1]]
        row = torch.linspace(0.5, 1.5, prod(shape) // batch.samples, dtype=dtype, device=device)
        columns = self._supports(device)[:, None, :, None] * row.reshape(batch.outer, 1, -1)
        return {edge: columns.reshape(len(columns), *shape)}

    def _layer(self, step: Step, record: Record) -> None:
        edge = (step.node, record.output_nr)
        passed_by = self.passed_by.get(edge, ())
        if step.node in self.found.shared:
            raise SamplesMixed(self._above(passed_by, record.where))
        batch = self._batch(edge)
        if passed_by:
            columns = self._columns(step)
            batch = self._placed(columns.get(record.output_nr), record, self._above(passed_by, record.where))
        elif edge not in self.said:
            batch = Batch(self.samples)
        if batch is None:
            raise BatchAxisLost(record.where, record.output_shape, self.samples)
        record.place(batch)
        for _, below in step.inputs:
            self._say(below, batch)

    def _placed(self, columns: Tensor | None, record: Record, above: str) -> Batch | None:
        """Where the batch of a layer's output is, that nodes lie above."""
        places = possible_batches(record.geometry.output_layout.rows(record.output_shape), self.samples)
        if columns is None or not places:
            return places[0] if places else None
        mixed = SamplesMixed(above)
        wrong = self._wrong(columns, places)
        if len(places) == 1:
            self.found.flags.append((wrong[0], mixed))
            return places[0]
        place = _first_right(places, wrong)
        if place is None:
            raise mixed
        return place

    def _node(self, step: Step, columns: dict[int, Tensor]) -> None:
        self.found.asked = True
        edges = {number: (step.node, number) for number in columns}
        above = tuple(dict.fromkeys(name for edge in edges.values() for name in self.passed_by.get(edge, ())))
        if self.locating:
            self._locate(step, columns)
        first = [Batch(self.samples)]
        ordered = step.node in self.also and step.node not in self.found.shared
        if above and ordered:
            error = SamplesMixed(self._above(above, step.where))
            self.found.flags += [(self._wrong(arrived, first)[0], error) for arrived in columns.values()]
        if step.inputs:
            passed = pull(step, columns)
            if ordered:
                error = SamplesMixed(step.where)
                own = {edge: below for edge, below in passed.items() if edge[0] not in self.found.shared}
                self.found.flags += [(self._wrong(below, first)[0], error) for below in own.values()]
            add(self.live, passed)
        for _, edge in step.inputs:
            self.passed_by[edge] = (*self.passed_by.get(edge, ()), *above, step.name)
            if step.node in self.found.shared:
                self.found.shared.add(edge[0])

    def _locate(self, step: Step, columns: Mapping[int, Tensor]) -> None:
        """Read where the samples of the node's outputs are: nowhere, if an element belongs to several."""
        if step.node in self.found.shared:
            return
        for number, arrived in columns.items():
            edge = (step.node, number)
            said = self.said.get(edge, set())
            batch = (
                next(iter(said))
                if len(said) == 1 and edge not in self.passed_by
                else self._read(arrived, edge_shape(edge))
            )
            if batch is None:
                self.found.shared.add(step.node)
                continue
            self.found.batches[edge] = batch
            shape = normalised_shape(step.node)
            if shape is not None and not _inside_channels(batch, shape):
                raise SamplesMixed(step.where)

    def _read(self, columns: Tensor, shape: Sequence[int]) -> Batch | None:
        places = possible_batches(tuple(shape), self.samples)
        return _first_right(places, self._wrong(columns, places)) if places else None

    def _wrong(self, columns: Tensor, places: Sequence[Batch]) -> Tensor:
        """For each place, whether an element is reached from another sample than the one it would belong to.

        Products 0 · inf say nothing.
        """
        reached = columns.flatten(1).abs() > 0
        if len(places) == 1:
            return self._leaves(reached, places[0])[None]
        has, lacks = reached.tensor_split(2)
        several = (has & lacks).any()
        digits = torch.arange(len(has), device=columns.device)
        label = (has.long() << digits[:, None]).sum(0)
        reached = reached.any(0)
        index = torch.arange(reached.numel(), device=columns.device)
        verdicts = []
        for place in places:
            outside = reached.numel() % (place.samples * place.outer) > 0
            own = index // max(1, reached.numel() // (place.samples * place.outer)) % place.samples
            verdicts.append(((own != label) & reached).any() | several | outside)
        return torch.stack(verdicts)

    def _leaves(self, reached: Tensor, place: Batch) -> Tensor:
        if reached.shape[1] % (place.samples * place.outer):
            return torch.ones((), dtype=torch.bool, device=reached.device)
        split = reached.reshape(len(reached), place.outer, place.samples, -1)
        return (split & ~self._supports(reached.device)[:, None, :, None]).any()

    def _supports(self, device: torch.device) -> Tensor:
        """Which samples each column is on [columns, N]: those with a binary digit, then those without it."""
        digits = torch.arange((self.samples - 1).bit_length(), device=device)
        has = (torch.arange(self.samples, device=device) >> digits[:, None]) % 2 == 1
        return torch.cat([has, ~has])

    @staticmethod
    def _above(names: Sequence[str], where: str) -> str:
        return f"{' → '.join(names)}, above {where}"


def _views_of_parameters(plan: Plan) -> set[Node]:
    """Nodes that do nothing but arrange a parameter, whatever the samples make of it: a row may be used by one alone."""
    found: set[Node] = set()
    for step in reversed(plan.steps):
        if step.name in VIEWS and (step.leaves or (step.inputs and all(edge[0] in found for _, edge in step.inputs))):
            found.add(step.node)
    return found


def _first_right(places: Sequence[Batch], wrong: Tensor) -> Batch | None:
    """Reads the verdicts."""
    return next((place for place, is_wrong in zip(places, wrong.tolist(), strict=True) if not is_wrong), None)


def _inside_channels(batch: Batch, shape: Sequence[int]) -> bool:
    """Whether each channel (axis 1), over which a normalisation takes statistics, holds one sample, as in instance normalisation."""
    inner = prod(shape) // max(batch.samples * batch.outer, 1)
    return batch.samples < 2 or (batch.outer % shape[0] == 0 and inner % prod(shape[2:]) == 0)
