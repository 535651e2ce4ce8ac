"""The part of the Hessian that the generalised Gauss-Newton matrix drops: Σ_o δ_o ∂²y_o of every curved layer.

One sweep carries δ = ∂L/∂y itself, and the curvature of the curved layers passed so far. What a pointwise layer adds is
diagonal, and is kept as such, d [*edge], while that is exact: through elementwise layers, and through a mixing layer below which
only the diagonal is asked for. Otherwise it becomes columns √|d| e_j with signs [V, N], a column space of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .axes import starred
from .evaluate import evaluate
from .passing import features, pull
from .plan import Plan, Step
from .record import Edge, Record
from .sweep import at_edge, at_output, through


class VisitColumns(Protocol):
    def __call__(self, step: Step, factor: Tensor, *signs: Tensor, space: Edge | None) -> None: ...


VisitDiagonal: TypeAlias = Callable[[Step, Tensor], None]


@dataclass
class Curvature:
    """At an edge: the gradient δ, the diagonal d, and by the edge that they started at, columns with their signs."""

    delta: Tensor
    diagonal: Tensor | None = None
    columns: dict[Edge, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __add__(self, other: Curvature) -> Curvature:
        columns = dict(self.columns)
        for space, (factor, signs) in other.columns.items():
            columns[space] = (columns[space][0] + factor if space in columns else factor, signs)
        return Curvature(self.delta + other.delta, _sum(self.diagonal, other.diagonal), columns)


def sweep_residual(
    plan: Plan,
    start: Mapping[Edge, Tensor],
    samples: int,
    visit_columns: VisitColumns,
    visit_diagonal: VisitDiagonal,
) -> None:
    """Pass δ [*edge] from the edges of `start`.

    `visit_columns` gets each layer with wanted parameters, columns [V, *output], their signs [V, N] and space;
    `visit_diagonal` the diagonal [*output]; all canonical.
    """
    enough = diagonal_is_enough(plan)
    live = {edge: Curvature(delta) for edge, delta in start.items()}
    for step in plan.steps:
        arrived = {edge[1]: live.pop(edge) for edge in [edge for edge in live if edge[0] is step.node]}
        if not arrived:
            continue
        if step.record is None:
            passed = _through_node(step, arrived, samples)
        else:
            passed = _through_layer(
                step, step.record, arrived[step.record.output_nr], enough, visit_columns, visit_diagonal
            )
        for edge, curvature in passed.items():
            live[edge] = live[edge] + curvature if edge in live else curvature


def _through_layer(
    step: Step,
    record: Record,
    curvature: Curvature,
    enough: Mapping[Edge, bool],
    visit_columns: VisitColumns,
    visit_diagonal: VisitDiagonal,
) -> dict[Edge, Curvature]:
    layer = record.definition
    delta = at_output(record, curvature.delta, lead=0)
    diagonal = None if curvature.diagonal is None else at_output(record, curvature.diagonal, lead=0)
    columns = {space: (at_output(record, s, lead=1), signs) for space, (s, signs) in curvature.columns.items()}
    if step.parameters:
        for space, (factor, signs) in columns.items():
            visit_columns(step, factor, signs, space=space)
        if diagonal is not None:
            visit_diagonal(step, diagonal)
    passed: dict[Edge, Curvature] = {}
    for _, edge in step.inputs:
        below = None
        if diagonal is not None and layer.diagonal is not None and (layer.elementwise or enough[edge]):
            below = at_edge(evaluate(layer.diagonal, layer, record.operand, diagonal), edge, lead=0)
        elif diagonal is not None:
            columns[step.node, record.output_nr] = columns_of(diagonal, record.samples)
        if layer.residual is not None:
            added = evaluate(layer.residual, layer, record.operand, delta)
            below = _sum(below, at_edge(added, edge, lead=0))
        passed[edge] = Curvature(
            delta=through(record, delta[None], edge)[0],
            diagonal=below,
            columns={space: (through(record, factor, edge), signs) for space, (factor, signs) in columns.items()},
        )
    return passed


def _through_node(step: Step, arrived: Mapping[int, Curvature], samples: int) -> dict[Edge, Curvature]:
    """A linear node: δ and columns pass by its backward. A diagonal need not stay one, so it becomes columns."""
    spaces: dict[Edge, tuple[dict[int, Tensor], Tensor]] = {}
    for number, curvature in arrived.items():
        for space, (factor, signs) in curvature.columns.items():
            spaces.setdefault(space, ({}, signs))[0][number] = factor
        if curvature.diagonal is not None:
            factor, signs = columns_of(curvature.diagonal, samples)
            spaces[step.node, number] = ({number: factor}, signs)
    deltas = pull(step, {number: curvature.delta[None] for number, curvature in arrived.items()})
    passed = {edge: Curvature(delta[0]) for edge, delta in deltas.items()}
    for space, (factors, signs) in spaces.items():
        for edge, factor in pull(step, factors).items():
            passed[edge].columns[space] = (factor, signs)
    return passed


def columns_of(diagonal: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """d [*shape] → columns √|d| e_j [V, *shape] and their signs [V, N], one column per element of a sample."""
    flat = diagonal.reshape(samples, features(diagonal.shape, samples))
    root = flat.abs().sqrt()
    return torch.diag_embed(root).transpose(0, 1).reshape(flat.shape[1], *diagonal.shape), flat.sign().T


def diagonal_is_enough(plan: Plan) -> dict[Edge, bool]:
    """Whether everything below an edge asks for the diagonal of its curvature alone."""
    enough: dict[Node, bool] = {}
    for step in reversed(plan.steps):
        here = step.record is not None and _asks_for_diagonal(step, step.record)
        enough[step.node] = here and all(enough[edge[0]] for _, edge in step.inputs)
    return {edge: enough[edge[0]] for step in plan.steps for _, edge in step.inputs}


def _asks_for_diagonal(step: Step, record: Record) -> bool:
    """An elementwise layer does. So does a parameter with the Kronecker structure δ(o, o′) a at one position, at the bottom."""
    layer = record.definition
    if not step.parameters:
        return layer.elementwise
    star = starred(layer.output_axes)
    shape = canonical_output(record)
    one_position = star is not None and len(shape) == 3 and shape[star] == 1
    kronecker = all("output_factor_expand" in layer.parameters[name] for name in step.parameters)
    return one_position and kronecker and not step.inputs


def canonical_output(record: Record) -> tuple[int, ...]:
    """Canonical shape of a layer's output."""
    assert record.canonical_output is not None
    return record.canonical_output


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other
