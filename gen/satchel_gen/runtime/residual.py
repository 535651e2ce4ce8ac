"""The part of the Hessian that the generalised Gauss-Newton matrix drops: Σ_o δ_o ∂²y_o/∂x∂x′ of one step, over all its inputs.

It is known as an operator on tangents. Which elements of a sample it couples is found by passing columns on parts of them, the way
`probe` tells samples apart: where only elements of one class do, one tangent reads a row of every class at once. With one element
in each class it is diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .evaluate import evaluate
from .passing import edge_shape, features
from .plan import Step
from .record import Edge
from .second import second_derivative
from .sweep import at_edge
from .torch_private import node_outputs

#: Tangents [V, *edge] by edge → the second derivative applied to them.
Operator: TypeAlias = Callable[[Mapping[Edge, Tensor]], Mapping[Edge, Tensor]]


@dataclass(frozen=True)
class Diagonal:
    """d [*edge] by edge."""

    by_edge: Mapping[Edge, Tensor]


@dataclass(frozen=True)
class Blocks:
    """A symmetric matrix M [N, X, X] over the X elements that a sample has in all edges; it couples elements of one class alone.

    members: the elements of each class [L, k], L·k = X.
    """

    operator: Operator
    edges: tuple[Edge, ...]
    samples: int
    members: Tensor

    @property
    def columns(self) -> int:
        """The most that `signed_columns` yields."""
        return 2 * self.members.numel()

    def diagonal(self) -> dict[Edge, Tensor]:
        """diag M [*edge] by edge."""
        classes, size = self.members.shape
        found = [self._rows(range(v, v + 1))[0, :, :, v] for v in range(size)]
        d = torch.stack(found, 2).reshape(self.samples, classes * size)
        return {edge: part[0] for edge, part in self._split(d[:, self.members.reshape(-1).argsort()][None]).items()}

    def dense(self) -> dict[tuple[Edge, Edge], Tensor]:
        """M in blocks [N, X_a, X_b], for each pair of edges once."""
        rows = self._rows(range(self.members.shape[1]))
        M = rows.new_zeros(self.samples, self.members.numel(), self.members.numel())
        M[:, self.members.T[:, :, None], self.members] = rows.transpose(0, 1)
        sizes = [features(edge_shape(edge), self.samples) for edge in self.edges]
        parts = [part.split(sizes, 2) for part in M.split(sizes, 1)]
        numbered = list(enumerate(self.edges))
        return {(a, b): parts[i][j] for i, a in numbered for j, b in numbered[i:]}

    def signed_columns(self, at_most: int) -> Iterator[tuple[dict[Edge, Tensor], Tensor]]:
        """Ranges of columns S [V, *edge] by edge, and their signs [V, N], Σ_v ± s sᵀ = M."""
        classes, size = self.members.shape
        together = max(1, at_most // (2 * classes))
        for v in range(0, size, together):
            chosen = range(v, min(v + together, size))
            rows = upper_rows(self._rows(chosen), v)  # [V, N, L, k]
            heads = self.members[:, chosen.start : chosen.stop].T  # [V, L]
            for some in torch.arange(classes).split(max(1, at_most // 2)):
                u = rows[:, :, some].transpose(1, 2).flatten(0, 1)  # [V·L, N, k]
                wide = u.new_zeros(*u.shape[:2], self.members.numel())
                where = self.members[some].expand(len(chosen), -1, -1).reshape(len(u), 1, size)
                wide.scatter_(2, where.expand_as(u), u)
                columns, signs = signed_pairs(heads[:, some].reshape(-1), wide)
                if len(columns):
                    yield self._split(columns), signs

    def _rows(self, chosen: range) -> Tensor:
        """Rows M[l_v, l_·] of the given members of every class [V, N, L, k]."""
        tangents = self.members.new_zeros(len(chosen), self.members.numel(), dtype=torch.bool)
        tangents.scatter_(1, self.members[:, chosen.start : chosen.stop].T, True)
        return apply(self.operator, self.edges, self.samples, tangents)[:, :, self.members]

    def _split(self, joined: Tensor) -> dict[Edge, Tensor]:
        return _split(joined, self.edges, self.samples)


def residual_of(step: Step, deltas: Mapping[int, Tensor], samples: int) -> Diagonal | Blocks | None:
    """What a step adds to the curvature of its inputs, given δ [*output] by output number; None where that is zero."""
    record = step.record
    if not step.inputs:
        return None
    if record is None:
        derivative = second_derivative(step, deltas)
        return None if derivative is None else structured(derivative, derivative.edges, samples)
    layer = record.definition
    ((_, edge),) = step.inputs
    if layer.residual is None and layer.hessian is None:
        return None
    delta = record.at_output(deltas[record.output_nr], lead=0)
    if layer.residual is not None:
        return Diagonal({edge: at_edge(evaluate(layer.residual, layer, record.operand, delta), edge, lead=0)})
    rule = layer.hessian
    assert rule is not None

    def operator(tangents: Mapping[Edge, Tensor]) -> dict[Edge, Tensor]:
        found = evaluate(rule, layer, record.operand, delta, tangents[edge].reshape(-1, *record.canonical_input))
        return {edge: at_edge(found, edge, lead=1)}

    return structured(operator, (edge,), samples)


def structured(operator: Operator, edges: tuple[Edge, ...], samples: int) -> Diagonal | Blocks | None:
    """The finest classes, of a few that can be expected, that the operator couples no two of."""
    for labels, classes in _candidates([_sample_shape(edge_shape(edge), samples) for edge in edges], edges[0][0]):
        if not _couples_classes(operator, edges, samples, labels, classes):
            break
    blocks = Blocks(operator, edges, samples, labels.argsort(stable=True).reshape(classes, -1))
    if blocks.members.shape[1] > 1:
        return blocks
    diagonal = blocks.diagonal()
    return Diagonal(diagonal) if any(d.count_nonzero() for d in diagonal.values()) else None


def _candidates(shapes: Sequence[tuple[int, ...]], node: Node) -> Iterator[tuple[Tensor, int]]:
    """Labels of the elements of a sample, many classes first: by all coordinates that the edges share, and by all but one."""
    rank = max(len(shape) for shape in shapes)
    shapes = [(shape[0], *(1,) * (rank - len(shape)), *shape[1:]) for shape in shapes]
    shared = [axis for axis in range(rank) if len({shape[axis] for shape in shapes}) == 1]
    kept = [shared, *([a for a in shared if a != axis] for axis in shared), [a for a in shared if a == 0], []]
    device = node_outputs(node)[0][2]
    for axes in sorted(kept, key=lambda axes: -prod(shapes[0][a] for a in axes)):
        extents = [shapes[0][a] if a in axes else 1 for a in range(rank)]
        numbers = torch.arange(prod(extents), device=device).reshape(extents)
        yield torch.cat([numbers.expand(shape).reshape(-1) for shape in shapes]), prod(extents)


def _sample_shape(shape: Sequence[int], samples: int) -> tuple[int, ...]:
    """Shape of one sample; the first axis holds what is joined with the batch."""
    if not samples or not shape or shape[0] % samples:
        return (features(shape, samples),)
    return (shape[0] // samples, *shape[1:])


def _couples_classes(operator: Operator, edges: tuple[Edge, ...], samples: int, labels: Tensor, classes: int) -> bool:
    """Any two classes differ in a binary digit of their number, and the operator is symmetric: so whether columns on the classes
    that have a digit leave them. The columns are drawn, for a constant or linear one may be mapped to zero."""
    digits = torch.arange((classes - 1).bit_length(), device=labels.device)
    if not len(digits):
        return False
    support = (labels >> digits[:, None]) % 2 == 1
    generic = torch.rand(len(labels), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    found = apply(operator, edges, samples, support, generic.to(labels.device))
    outside = found.masked_fill(support[:, None], 0).nan_to_num(nan=0.0)  # products 0 · inf say nothing
    return bool(outside.count_nonzero())


def apply(
    operator: Operator, edges: tuple[Edge, ...], samples: int, support: Tensor, values: Tensor | None = None
) -> Tensor:
    """The operator on tangents that are the same for every sample, `values` [X] (1) on `support` [V, X] → [V, N, X]."""
    tangents = support.to(torch.float64) if values is None else support * values
    spread = _split(tangents[:, None].expand(-1, samples, -1), edges, samples)
    spread = {edge: part.to(node_outputs(edge[0])[edge[1]][1]) for edge, part in spread.items()}
    found = operator(spread)
    joined = torch.cat([found[edge].reshape(len(support), samples, -1) for edge in edges], 2)
    return joined.to(torch.promote_types(joined.dtype, torch.float32))


def _split(joined: Tensor, edges: tuple[Edge, ...], samples: int) -> dict[Edge, Tensor]:
    """[V, N, X] → [V, *edge] by edge."""
    parts = joined.split([features(edge_shape(edge), samples) for edge in edges], 2)
    return {edge: part.reshape(len(joined), *edge_shape(edge)) for edge, part in zip(edges, parts, strict=True)}


def upper_rows(rows: Tensor, first: int) -> Tensor:
    """Rows [V, …, k] of a symmetric matrix from number `first` → of U, U + Uᵀ = M: above the diagonal, and half of it."""
    V, k = rows.shape[0], rows.shape[-1]
    number, other = torch.arange(first, first + V, device=rows.device)[:, None], torch.arange(k, device=rows.device)
    weight = (other > number).to(rows.dtype) + 0.5 * (other == number).to(rows.dtype)
    return rows * weight.reshape(V, *(1,) * (rows.ndim - 2), k)


def signed_pairs(heads: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_v e_v u_vᵀ + u_v e_vᵀ as Σ ± s sᵀ with s = (√r e_v ± u_v / √r) / √2, r = ‖u_v‖.

    heads [V], rows u [V, N, X] → columns [2V, N, X] and signs [2V, N], without those that are zero for every sample. No digits are
    lost against M's largest entries: both columns of a pair are of the size of √r, and M's entries in the row of r.
    """
    size = rows.norm(dim=2)
    kept = (size != 0).any(1)
    heads, rows, root = heads[kept], rows[kept], size[kept].sqrt()
    scaled = torch.where(root[:, :, None] == 0, rows, rows / root[:, :, None])
    unit = torch.zeros_like(rows).scatter_(2, heads[:, None, None].expand(-1, rows.shape[1], 1), root[:, :, None])
    signs = rows.new_ones(len(rows), rows.shape[1])
    return torch.cat([unit + scaled, unit - scaled]) * 0.5**0.5, torch.cat([signs, -signs])
