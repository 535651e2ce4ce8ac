"""Uses of parameters by nodes that belong to no recorded layer: tied weights, embeddings of positions, attention, recurrent cells.

A node whose name a definition lists is a call of that layer: its rules apply, with operands that autograd has saved. For any other
node there is `pullback`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.functional import pad

from .axes import Batch
from .calls import ByRules, Call
from .errors import BatchAxisLost, NodeFailed
from .parts import Part, part_of
from .passing import edge_shape
from .plan import Plan, Step
from .probe import Found
from .pullback import PARAMETER, Pullback, operation
from .record import Edge, Mark, Record
from .rules import Layer, registry
from .torch_private import leaf_of, saved


@dataclass(frozen=True)
class Owned:
    """A parameter by the innermost extended module that holds it."""

    mark: Mark
    name: str

    @property
    def module(self) -> weakref.ref[nn.Module]:
        return self.mark.module


def resolve(plan: Plan, found: Found, owned: Mapping[int, Owned]) -> Plan:
    """The plan with the calls that nodes without record are; what is computed from parameters alone is part of a call."""
    shared = {step.node: step for step in plan.steps if step.record is None and step.node in found.shared}
    below = _parameters_below(shared)
    steps = []
    for step in plan.steps:
        if step.node in shared:
            continue
        if step.record is not None:
            steps.append(step)
            continue
        own = [(position, edge) for position, edge, _ in step.leaves]
        own += [(position, edge) for position, edge in step.inputs if edge[0] in shared]
        routes = [(position, edge, below[edge[0]] if edge[0] in shared else _leaf(edge)) for position, edge in own]
        calls = _calls(step, routes, shared, found, owned)
        inputs = tuple((position, edge) for position, edge in step.inputs if edge[0] not in shared)
        steps.append(replace(step, inputs=inputs, calls=tuple(calls)))
    return replace(plan, steps=tuple(steps)).pruned()


def _leaf(edge: Edge) -> dict[int, Tensor]:
    leaf = leaf_of(edge[0])
    return {} if leaf is None else {id(leaf): leaf}


def _parameters_below(shared: Mapping[Node, Step]) -> dict[Node, dict[int, Tensor]]:
    """The parameters that a node is computed from."""
    below: dict[Node, dict[int, Tensor]] = {}
    for node, step in reversed(list(shared.items())):
        found = {id(leaf): leaf for _, _, leaf in step.leaves}
        for _, edge in step.inputs:
            found |= below.get(edge[0], {})
        below[node] = found
    return below


Route = tuple[int, Edge, dict[int, Tensor]]


def _calls(
    step: Step, routes: Sequence[Route], shared: Mapping[Node, Step], found: Found, owned: Mapping[int, Owned]
) -> Iterator[Call]:
    """Those of definitions first; what they do not cover, by pullbacks."""
    rest: dict[int, tuple[Tensor, list[tuple[int, Edge]]]] = {}
    for position, edge, leaves in routes:
        if len(leaves) == 1:
            (leaf,) = leaves.values()
            call = _defined(step, position, edge, leaf, shared, found, owned[id(leaf)])
            if call is not None:
                yield call
                continue
        for key, leaf in leaves.items():
            rest.setdefault(key, (leaf, []))[1].append((position, edge))
    batches = {edge[1]: batch for edge, batch in found.batches.items() if edge[0] is step.node}
    for key, (leaf, edges) in rest.items():
        if not batches:  # the backward did not start where samples can be told apart
            raise BatchAxisLost(step.where, edge_shape((step.node, 0)), None)
        path = tuple(Step(s.node, None, tuple(_towards(s, leaf, shared))) for s in shared.values())
        yield Pullback(
            record=_record(step, owned[key], operation(), PARAMETER, leaf, next(iter(batches.values()))),
            parameters={PARAMETER: leaf},
            node=Step(step.node, None, tuple(edges)),
            path=tuple(s for s in path if s.inputs),
            batches=batches,
        )


def _towards(step: Step, leaf: Tensor, shared: Mapping[Node, Step]) -> Iterator[tuple[int, Edge]]:
    """The inputs of a node that lead to a parameter."""
    yield from ((position, edge) for position, edge, other in step.leaves if other is leaf)
    for position, edge in step.inputs:
        if edge[0] in shared and any(True for _ in _towards(shared[edge[0]], leaf, shared)):
            yield position, edge


def _record(step: Step, owner: Owned, layer: Layer, name: str, parameter: Tensor, batch: Batch) -> Record:
    record = NodeRecord(
        name=owner.mark.name,
        module=owner.module,
        options={},
        node_shape=edge_shape((step.node, 0)),
        output_nr=0,
        edge=None,
        definition=layer,
        parameters={name: weakref.ref(parameter)},
        output_shape=edge_shape((step.node, 0)),
        node_name=step.name,
        parameter_name=owner.name,
    )
    record.versions[name] = parameter._version
    record.geometry = record.geometry.at(batch)
    return record


@dataclass(eq=False, kw_only=True)
class NodeRecord(Record):
    """The use of a parameter by a node."""

    node_name: str = ""
    parameter_name: str = ""

    @property
    def owner(self) -> str:
        """The module that holds the parameter."""
        return super().where

    @property
    def where(self) -> str:
        return f"{self.owner}, parameter {self.parameter_name!r} in {self.node_name}"

    def called(self, parameter: str) -> str:
        return self.parameter_name


# ------------------------------------------------------------------------------------------------ calls of definitions


@dataclass(eq=False)
class OfPart(ByRules):
    """A call of a definition with a part of a parameter: as with the whole, where the rest of the output is zero."""

    part: Part

    def widened(self, tensor: Tensor, axis: int) -> Tensor:
        part, behind = self.part, tensor.ndim - 1 - axis % tensor.ndim
        after = part.total - part.start - part.extent
        return pad(tensor, (*(0, 0) * behind, part.start, after)) if part.start or after else tensor


def _defined(
    step: Step, position: int, edge: Edge, leaf: Tensor, shared: Mapping[Node, Step], found: Found, owner: Owned
) -> Call | None:
    """The call of a definition that one input of a node is, if there is one."""
    for layer in registry().layers:
        for call in layer.nodes:
            names = [name for name, (there, _) in call.parameters.items() if there == position]
            batch = found.batches.get((step.node, 0))
            if call.name != step.name or not names or batch is None:
                continue
            name = names[0]
            if any(saved(step.node, option) != value for option, value in call.options.items()):
                continue
            part = part_of(edge, leaf, call.parameters[name][1], shared)
            if part is None:
                continue
            record = _record(step, owner, layer, name, leaf, batch)
            record.transposed = part.transposed
            fits = batch.canonical_shape(record.geometry.output_layout, record.output_shape) is not None
            if not fits or record.output_shape[-1] != part.extent:  # a broadcast parameter is another formula
                continue
            if call.input is not None and "input" in layer.reads_of(name):
                tensor, at = call.input
                record.edge = next((edge for position, edge in step.inputs if position == at), None)
                try:
                    x = saved(step.node, tensor)
                    record.input_shape = tuple(x.shape)
                    record.geometry = replace(record.geometry, input_shape=record.input_shape)
                    record.keep(input=x)
                except RuntimeError as error:  # freed, or changed in place
                    raise NodeFailed(step.where) from error
            return OfPart(record, {name: leaf}, part)
    return None
