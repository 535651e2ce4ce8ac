"""DiagHessian's recursion: the second derivatives of every step, Σ_o δ_o ∂²y_o, passed down to the parameters.

What a step adds is passed in the cheapest form. A diagonal d [*edge] stays one through elementwise steps, and at the last step that
mixes, where all below asks for the diagonal alone. Otherwise it becomes signed columns, Σ_v ± s sᵀ, which are independent of all
others: a range of them is passed to the bottom before the next is formed. Or it is added to one matrix per sample over all live
edges, from some step on: passing that costs the same however many steps have added to it, so deep networks cost linearly in depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf, prod
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .calls import Call
from .cost import forced_program
from .evaluate import evaluate
from .flags import first_raised
from .joint import Joint, both_through, columns_of, rows_through
from .lazy import lazy
from .passing import edge_shape, features, pull
from .plan import Plan, Step
from .probe import Probe
from .record import Edge
from .residual import Blocks, Diagonal, residual_of, signed_pairs, upper_rows
from .sweep import add, at_edge, pass_step, take
from .torch_private import node_outputs


class Gathered(Protocol):
    """Collects one range of columns: `visit` gets each use of wanted parameters, its factor of V columns and signs [V, N]."""

    def visit(self, call: Call, factor: Tensor, signs: Tensor) -> None: ...

    def finish(self) -> None: ...


Gather: TypeAlias = Callable[[], Gathered]
#: Gets a use of wanted parameters and the diagonal of the curvature at its output.
VisitDiagonal: TypeAlias = Callable[[Call, Tensor], None]
Residuals: TypeAlias = Mapping[Node, Diagonal | Blocks]


def residuals_of(
    plan: Plan, start: Mapping[Edge, Tensor], samples: int
) -> tuple[Residuals, Mapping[Node, Mapping[int, Tensor]]]:
    """What each step adds, where δ [*edge] starts at the edges of `start`; and δ where a parameter itself adds something: by its use
    if that is not linear, and if it is used again below."""
    found: dict[Node, Diagonal | Blocks] = {}
    at_uses: dict[Node, Mapping[int, Tensor]] = {}
    live = {edge: delta[None] for edge, delta in start.items()}
    curved = [number for number, step in enumerate(plan.steps) if may_add(plan, step)]
    for step in plan.steps[: max(curved, default=-1) + 1]:  # δ is asked for no further
        deltas = take(live, step)
        if not deltas:
            continue
        here = {number: delta[0] for number, delta in deltas.items()}
        residual = residual_of(step, here, samples)
        if residual is not None:
            found[step.node] = residual
        if step.node in plan.reused or not all(call.linear for call in step.calls):
            at_uses[step.node] = here
        add(live, pass_step(step, deltas))
    return found, at_uses


def may_add(plan: Plan, step: Step) -> bool:
    """Whether δ is needed at a step."""
    layer = None if step.record is None else step.record.definition
    curved = not step.linear if layer is None else layer.residual is not None or layer.hessian is not None
    return curved or step.node in plan.reused or not all(call.linear for call in step.calls)


class HessianSweep:
    """Passes what the steps add; everything that the callbacks get is canonical."""

    def __init__(
        self,
        plan: Plan,
        residuals: Residuals,
        samples: int,
        gather: Gather,
        visit_diagonal: VisitDiagonal,
        limit: int,
        itemsize: int,
    ) -> None:
        self.plan, self.residuals, self.samples = plan, residuals, samples
        self.gather, self.visit_diagonal = gather, visit_diagonal
        self.bytes, self.itemsize = limit, itemsize
        self.at_most = max(1, self.bytes // max(1, plan.column_bytes(itemsize)))
        self.diagonal: dict[Edge, Tensor] = {}
        self.joint = Joint()
        self._elementwise: dict[Node, bool] = {}

    def run(self) -> None:
        dense_from = self._dense_from()
        for number, step in enumerate(self.plan.steps):
            if step.node in self.enough:
                self._take_diagonal(step)
            diagonal = take(self.diagonal, step)
            if step.calls:
                self._visit(step, diagonal)
            if diagonal and (step.inputs or step.node in self.plan.reused):
                self._pass_diagonal(number, step, diagonal, dense=number >= dense_from)
            self._pass_joint(step)
            residual = self.residuals.get(step.node)
            if isinstance(residual, Diagonal):
                add(self.diagonal, residual.by_edge)
            elif residual is not None and all(edge[0] in self.enough for edge in residual.edges):
                add(self.diagonal, residual.diagonal())
            elif residual is not None and number + 1 >= dense_from:
                for (a, b), block in residual.dense().items():
                    self.joint.add(a, b, block)
            elif residual is not None:
                for columns, signs in residual.signed_columns(self.at_most):
                    self._descend(columns, signs, number + 1)

    def _visit(self, step: Step, diagonal: Mapping[int, Tensor]) -> None:
        """Serve the uses of parameters from the diagonal and from the matrix at the step's output."""
        if diagonal and step.node not in self.plan.reused:
            rest = [call for call in step.calls if not (step.apart and self._served(call, diagonal))]
            for output_nr, d in diagonal.items() if rest else ():
                flat = d.reshape(self.samples, features(d.shape, self.samples))
                for columns, signs in self._diagonal_columns(flat, (step.node, output_nr)):
                    self._gather(rest, {output_nr: columns}, signs)
        slots = [slot for slot in self.joint.slots if slot[0] is step.node]
        if slots:
            self._visit_matrix(step, slots)

    def _served(self, call: Call, diagonal: Mapping[int, Tensor]) -> bool:
        d = call.diagonal(diagonal)
        if d is not None:
            self.visit_diagonal(call, d)
        return d is not None

    def _gather(self, calls: Sequence[Call], columns: Mapping[int, Tensor], signs: Tensor) -> None:
        gathered = self.gather()
        for call in calls:
            gathered.visit(call, call.factor(columns), signs)
        gathered.finish()

    # ------------------------------------------------------------------------------------------------- a diagonal

    def _pass_diagonal(self, number: int, step: Step, diagonal: dict[int, Tensor], dense: bool) -> None:
        if self._keeps_diagonal(step):
            for _, edge in step.inputs:
                add(self.diagonal, {edge: self._diagonal_below(step, edge, diagonal)})
            return
        for output_nr, d in diagonal.items():
            slot = step.node, output_nr
            flat = d.reshape(self.samples, features(d.shape, self.samples))
            if dense:
                self.joint.add(slot, slot, torch.diag_embed(flat))
                continue
            for columns, signs in self._diagonal_columns(flat, slot):
                if step.node in self.plan.reused:
                    self._descend({slot: columns}, signs, number)
                else:
                    self._descend(pass_step(step, {output_nr: columns}), signs, number + 1)

    def _keeps_diagonal(self, step: Step) -> bool:
        """Whether the diagonal of the curvature of its inputs is all that is needed of, or known from, that of its output."""
        if step.node in self.plan.reused or not step.inputs:
            return False
        if self._is_elementwise(step):
            return True
        record = step.record
        enough = all(edge[0] in self.enough for _, edge in step.inputs)
        return enough and record is not None and record.definition.diagonal is not None

    def _diagonal_below(self, step: Step, edge: Edge, diagonal: Mapping[int, Tensor]) -> Tensor:
        """Σ_y (∂y/∂x)² d."""
        record = step.record
        if record is None:
            ((number, d),) = diagonal.items()
            slope = pull(step, {number: torch.ones_like(d)[None]})[edge][0]
            return slope.square() * d.reshape(slope.shape)
        layer = record.definition
        assert layer.diagonal is not None
        d = record.at_output(diagonal[record.output_nr], lead=0)
        return at_edge(evaluate(layer.diagonal, layer, record.operand, d), edge, lead=0)

    def _diagonal_columns(self, flat: Tensor, slot: Edge) -> Iterator[tuple[Tensor, Tensor]]:
        """d [N, F] → ranges of √|d| e_j [V, *edge] and their signs [V, N], one column per element that is not zero throughout."""
        root, signs = flat.abs().sqrt(), flat.sign()
        for chosen in (flat != 0).any(0).nonzero()[:, 0].split(self.at_most):
            columns = root.new_zeros(len(chosen), *root.shape)
            columns.scatter_(2, chosen[:, None, None].expand(-1, len(root), 1), root.T[chosen][:, :, None])
            if len(chosen):
                yield columns.reshape(len(chosen), *edge_shape(slot)), signs.T[chosen]

    # ---------------------------------------------------------------------------------------------------- columns

    def _descend(self, live: dict[Edge, Tensor], signs: Tensor, first: int) -> None:
        """Pass columns of one space from step `first` on; where the diagonal is enough, they become one."""
        gathered = self.gather()
        for step in self.plan.steps[first:]:
            columns = take(live, step)
            if not columns:
                continue
            if step.node in self.enough:
                for number, factor in columns.items():
                    squares = factor.reshape(len(factor), self.samples, -1).square()
                    d = torch.einsum("vnx,vn->nx", squares, signs.to(squares.dtype))
                    add(self.diagonal, {(step.node, number): d.reshape(factor.shape[1:])})
                continue
            for call in step.calls:
                gathered.visit(call, call.factor(columns), signs)
            add(live, pass_step(step, columns, last=True))
        gathered.finish()

    # --------------------------------------------------------------------------------------------------- matrices

    def _pass_joint(self, step: Step) -> None:
        outer = self.joint.take(step)
        if not outer:
            return
        for other in dict.fromkeys(slot for rows in outer.values() for slot in rows if slot not in outer):
            rows = {slot: blocks[other] for slot, blocks in outer.items() if other in blocks}
            for edge, block in rows_through(step, rows, self.samples).items():
                self.joint.add_rows(edge, other, block)
        if len(outer) == 1 and self._is_last(step):
            ((slot, blocks),) = outer.items()
            ((_, edge),) = step.inputs
            add(self.diagonal, {edge: self._diagonal_of_both(step, slot, edge, blocks[slot])})
            return
        for (a, b), block in both_through(step, outer, self.samples).items():
            self.joint.add(a, b, block)

    def _is_last(self, step: Step) -> bool:
        """Whether the diagonal is enough for the only input of a step, and nothing else leads to that."""
        edges = [edge for _, edge in step.inputs]
        return len(edges) == 1 and edges[0][0] in self.enough and self.consumers[edges[0]] == 1

    def _diagonal_of_both(self, step: Step, slot: Edge, edge: Edge, block: Tensor) -> Tensor:
        """diag(J_nᵀ G J_n) = Σ_y (J_n)_y (G J_n)_y, without the matrix."""
        unit = torch.eye(block.shape[1], dtype=block.dtype, device=block.device).expand_as(block)
        rows, slopes = (
            pass_step(step, {slot[1]: columns_of(part, slot, self.samples, step)})[edge] for part in (block, unit)
        )
        return torch.einsum("v...,v...->...", rows, slopes)

    def _take_diagonal(self, step: Step) -> None:
        for slot, rows in self.joint.take(step).items():
            d = rows[slot].diagonal(dim1=1, dim2=2)
            add(self.diagonal, {slot: d.reshape(edge_shape(slot))})

    def _visit_matrix(self, step: Step, slots: Sequence[Edge]) -> None:
        M = self.joint.over(slots)
        sizes = [features(edge_shape(slot), self.samples) for slot in slots]
        parts = zip(slots, M.diagonal(dim1=1, dim2=2).split(sizes, 1), strict=True)
        diagonal = {slot[1]: d.reshape(edge_shape(slot)) for slot, d in parts}
        rest = [call for call in step.calls if not (call.reads_diagonal and self._served(call, diagonal))]
        for chosen in torch.arange(sum(sizes), device=M.device).split(max(1, self.at_most // 2)) if rest else ():
            columns, signs = signed_pairs(chosen, upper_rows(M[:, chosen].transpose(0, 1), int(chosen[0])))
            if len(columns):
                split = zip(slots, columns.split(sizes, 2), strict=True)
                shaped = {slot[1]: part.reshape(len(columns), *edge_shape(slot)) for slot, part in split}
                self._gather(rest, shaped, signs)

    # --------------------------------------------------------------------------------------- what the plan tells

    @lazy
    def enough(self) -> frozenset[Node]:
        """Steps from which on everything asks for the diagonal of the curvature alone, on a path that meets no other."""
        found: set[Node] = set()
        for step in reversed(self.plan.steps):
            if step.node in self.plan.shared or any(
                edge[0] not in found or self.consumers[edge] > 1 for _, edge in step.inputs
            ):
                continue
            at_bottom = not step.inputs and all(call.reads_diagonal for call in step.calls)
            if at_bottom or (step.inputs and not step.calls and self._is_elementwise(step)):
                found.add(step.node)
        return frozenset(found)

    @lazy
    def consumers(self) -> Mapping[Edge, int]:
        """How often an edge is an input."""
        found: dict[Edge, int] = {}
        for step in self.plan.steps:
            for _, edge in step.inputs:
                found[edge] = found.get(edge, 0) + 1
        return found

    def _is_elementwise(self, step: Step) -> bool:
        """Whether each element of the one input meets one of the output: a layer says so, a node is asked with columns."""
        if step.record is not None:
            return step.record.definition.elementwise and step.record.definition.diagonal is not None
        if step.node not in self._elementwise:
            self._elementwise[step.node] = is_elementwise(step)
        return self._elementwise[step.node]

    # ------------------------------------------------------------------------------------------- columns or matrix

    def _dense_from(self) -> int:
        """The step from which on matrices are passed. Once they are, further residuals cost nothing more: so the first few
        sources are passed as columns, and all others as matrices, however many are best."""
        sources, never = self._sources(), len(self.plan.steps)
        if self.plan.shared or not sources or forced_program() == "columns":
            return never
        choices = [number for number, _ in sources]
        if forced_program() == "dense":
            best = choices[0]
        else:
            work = {first: self._columns_work(sources, first) + self._dense_work(first) for first in [*choices, never]}
            best = min(work, key=lambda first: work[first])
        return best if best == never or self._samples_outermost() else never

    def _samples_outermost(self) -> bool:
        """Whether every edge can be read as [N, F]."""
        shapes = {edge: edge_shape(edge) for edge in self.plan.start}
        return first_raised(Probe(self.plan, shapes, self.samples, self.plan.nodes).run().flags) is None

    def _sources(self) -> list[tuple[int, int]]:
        """Steps at which curvature stops to be diagonal, and how many columns it is from there on."""
        found: list[tuple[int, int]] = []
        diagonal: set[Edge] = set()
        for number, step in enumerate(self.plan.steps):
            arrived = [edge for edge in diagonal if edge[0] is step.node]
            if arrived and self._keeps_diagonal(step):
                diagonal |= {edge for _, edge in step.inputs}
            elif arrived and step.inputs:
                found.append((number, sum(self._size(edge) for edge in arrived)))
            residual = self.residuals.get(step.node)
            if isinstance(residual, Diagonal):
                diagonal |= residual.by_edge.keys()
            elif residual is not None and any(edge[0] not in self.enough for edge in residual.edges):
                found.append((number + 1, residual.columns))
        return found

    def _columns_work(self, sources: Sequence[tuple[int, int]], until: int) -> float:
        steps = self.plan.steps
        return sum(columns * sum(map(self._work, steps[number:])) for number, columns in sources if number < until)

    def _dense_work(self, first: int) -> float:
        """Both sides of all matrices from step `first` on; infinite where they take too much memory."""
        live: set[Edge] = set()
        total, most = 0.0, 0
        for step in self.plan.steps[first:]:
            arrived = {edge for edge in live if edge[0] is step.node} or {(step.node, 0)}
            live -= arrived
            if step.node in self.enough:
                continue
            edges = {edge for _, edge in step.inputs}
            sizes = [sum(map(self._size, some)) for some in (live, arrived, edges)]
            most = max(most, sum(sizes) ** 2)
            total += (sum(sizes[:2]) + (sizes[1] if self._is_last(step) else sizes[2])) * self._work(step)
            live |= edges
        return total if 2 * self.samples * most * self.itemsize <= self.bytes else inf

    def _work(self, step: Step) -> float:
        """Of passing one column of one sample, in multiplications or elements moved."""
        if step.node in self.enough:
            return 0.0
        records = [step.record] if step.record is not None else [call.record for call in step.calls]
        references = [reference for record in records for reference in record.parameters.values()]
        weights = sum(p.numel() for reference in references if (p := reference()) is not None)
        return self._size((step.node, 0)) + sum(self._size(edge) for _, edge in step.inputs) + weights

    def _size(self, edge: Edge) -> int:
        return features(edge_shape(edge), self.samples)


def is_elementwise(step: Step) -> bool:
    """Whether a node maps each element to the one at its place: columns on the elements whose number has a binary digit, and on
    those whose number has not, must stay there."""
    edges, outputs = {edge for _, edge in step.inputs}, node_outputs(step.node)
    if len(edges) != 1 or len(outputs) != 1:
        return False
    ((shape, dtype, device),) = outputs
    size = prod(shape)
    if size != prod(edge_shape(*edges)):
        return False
    digits = torch.arange((size - 1).bit_length(), device=device)
    has = (torch.arange(size, device=device) >> digits[:, None]) % 2 == 1
    support = torch.cat([has, ~has])
    if not len(support):
        return True
    generic = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    (found,) = pull(step, {0: (support * generic.to(device)).to(dtype).reshape(-1, *shape)}).values()
    return not found.reshape(len(support), size).masked_fill(support, 0).nan_to_num(nan=0.0).count_nonzero()
