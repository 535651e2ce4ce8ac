"""How a step of a plan uses parameters: a layer by the rules of its definition, other nodes as `nodes` finds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .axes import starred
from .record import Edge, Record
from .uses import PER_SAMPLE, Use, shaped


@dataclass(eq=False)
class Call(ABC):
    """Wanted parameters by name, and the record whose rules they have. Tensors at outputs are given by output number."""

    record: Record
    parameters: Mapping[str, Tensor]

    @property
    @abstractmethod
    def outputs(self) -> Collection[int]:
        """The numbers of the outputs that the parameters are in."""

    @abstractmethod
    def factor(self, columns: Mapping[int, Tensor]) -> Tensor:
        """What the rules take, from columns [V, *output]. May call the node: it must not be freed."""

    @abstractmethod
    def along(self, name: str, deltas: Mapping[int, Tensor], edge: Edge, tangents: Tensor) -> Tensor | None:
        """Σ_y δ_y ∂²y/∂θ∂x v [V, N, *θ] of tangents v [V, *edge] at an input x; None where it is zero."""

    def at_input(self, tensor: Tensor, edge: Edge) -> Tensor:
        """[V, N, X] over the elements of a sample as an input has them."""
        return tensor

    def diagonal(self, diagonals: Mapping[int, Tensor]) -> Tensor | None:
        """What the rules take, from diagonals [*output] of a curvature; None where they need its columns."""
        return None

    def widened(self, tensor: Tensor, axis: int) -> Tensor:
        """A tensor over the outputs of the node as one over what the rules take, along the output's last axis."""
        return tensor

    def curved(self, deltas: Mapping[int, Tensor], limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs t, t′ [V, N, *θ] whose 2 Σ_v t t′ add up to Σ_y δ_y ∂²y/∂θ²; none where y is linear in θ."""
        yield from ()

    @property
    def linear(self) -> bool:
        """Whether y is known to be linear in θ. Otherwise the samples must be outermost where θ is used again below."""
        return True

    @property
    def twice_differentiable(self) -> bool:
        """Whether `along` and `curved` can be had."""
        return True

    @property
    def reads_diagonal(self) -> bool:
        """Whether the diagonal of J_θᵀ G J_θ reads that of G alone."""
        return False

    @property
    def factor_size(self) -> int:
        """Elements that the factor of one column has beyond the column."""
        return 0


@dataclass(eq=False)
class ByRules(Call):
    """A call of a definition, which is linear in its parameters."""

    @property
    def outputs(self) -> tuple[int]:
        return (self.record.output_nr,)

    def at_output(self, tensor: Tensor, lead: int) -> Tensor:
        """A tensor [*lead, *node] as what the rules take."""
        return self.widened(self.record.at_output(tensor, lead), -1)

    def at_input(self, tensor: Tensor, edge: Edge) -> Tensor:
        if edge != self.record.edge:
            return tensor
        return self.record.at_input(tensor.reshape(len(tensor), *self.record.canonical_input), lead=1)

    def factor(self, columns: Mapping[int, Tensor]) -> Tensor:
        return self.at_output(columns[self.record.output_nr], lead=1)

    def diagonal(self, diagonals: Mapping[int, Tensor]) -> Tensor | None:
        return self.at_output(diagonals[self.record.output_nr], lead=0)

    def along(self, name: str, deltas: Mapping[int, Tensor], edge: Edge, tangents: Tensor) -> Tensor | None:
        record = self.record
        rule = record.definition.parameters[name][PER_SAMPLE]
        if edge != record.edge or "input" not in rule.operands:  # ∂y/∂θ does not depend on x
            return None
        operands = [record.operand(operand) for operand in rule.operands]
        place = rule.operands.index("input")
        factor = self.at_output(deltas[record.output_nr], lead=0)[None]
        v = record.batch.to_front(tangents.reshape(len(tangents), *record.input_shape), record.geometry.input_layout, 1)

        def pullback(x: Tensor) -> Tensor:
            return rule.aten(factor, *operands[:place], x, *operands[place + 1 :])[0]

        x = operands[place].detach()
        found = torch.vmap(lambda tangent: torch.func.jvp(pullback, (x,), (tangent.to(x.dtype),))[1])(v)
        return shaped(rule, Use(record, name), found)

    @property
    def reads_diagonal(self) -> bool:
        """Whether the parameters have the Kronecker structure δ(o, o′) a at one position."""
        layer, shape = self.record.definition, self.record.canonical_output
        star = starred(layer.output_axes)
        one_position = star is not None and len(shape) == 3 and shape[star] == 1
        return one_position and all("output_factor_expand" in layer.parameters[name] for name in self.parameters)
