"""A use of a parameter that no definition covers: the individual pullbacks are computed by the node's own backward, one sample at a
time, and so is its second derivative. Exact, at N times the node's cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import torch
from torch import Tensor, nn

from .axes import Batch
from .calls import Call
from .errors import BatchAxisLost
from .passing import edge_shape, pull
from .plan import Step
from .record import Edge
from .rules import Layer, Rule, registry
from .second import is_twice_differentiable, second_derivative
from .settings import current
from .sweep import add, take
from .torch_private import node_outputs
from .uses import PER_SAMPLE

PARAMETER = "parameter"


@cache
def operation() -> Layer:
    """A layer of which only individual pullbacks are known, T [V, N, *p]: they are the factor."""

    def per_sample(factor: Tensor) -> Tensor:
        return factor

    reductions = registry().reductions.items()
    rules = {name: Rule(reduction.function) for name, reduction in reductions if reduction.of == PER_SAMPLE}
    return Layer(
        name="operation",
        module=nn.Module,
        formula="T[v, n, p] = Σ_y J[n, y, p] factor[v, n, y], by the node's own backward",
        kernels="",
        input_axes=("n", "x*"),
        output_axes=("n", "y*"),
        vjp=None,
        diagonal=None,
        mean_vjp=None,
        sandwich=None,
        residual=None,
        hessian=None,
        elementwise=False,
        mixed=True,
        positional=False,
        parameters={PARAMETER: {PER_SAMPLE: Rule(per_sample), **rules}},
    )


@dataclass(eq=False)
class Pullback(Call):
    """T[v, n, p] = Σ_y J[n, y, p] s[v, n, y], by the backward of the node and of what computes its input from the parameter."""

    node: Step
    path: tuple[Step, ...]
    batches: Mapping[int, Batch]

    @property
    def outputs(self) -> range:
        return range(len(node_outputs(self.node.node)))

    @property
    def factor_size(self) -> int:
        return self.record.samples * sum(parameter.numel() for parameter in self.parameters.values())

    def factor(self, columns: Mapping[int, Tensor]) -> Tensor:
        (parameter,) = self.parameters.values()
        count, samples = len(next(iter(columns.values()))), self.record.samples
        if not samples:
            return parameter.new_zeros(count, 0, *parameter.shape)
        sizes = [prod(edge_shape((self.node.node, number))) for number in columns]
        sizes += [prod(edge_shape(edge)) for step in (self.node, *self.path) for _, edge in step.inputs]
        size = max(1, current().step_bytes // max(1, sum(sizes) * next(iter(columns.values())).element_size()))
        pairs = torch.arange(count * samples, device=parameter.device)
        found = torch.cat([self._pulled(columns, some // samples, some % samples) for some in pairs.split(size)])
        return found.reshape(count, samples, *parameter.shape)

    def _pulled(self, columns: Mapping[int, Tensor], v: Tensor, n: Tensor) -> Tensor:
        """[pairs, *p] for pairs of a column and a sample."""
        if columns.keys() - self.batches.keys():
            raise BatchAxisLost(self.record.where, self.record.output_shape, self.record.samples)
        masked = {number: self._only(columns[number][v], n, self.batches[number]) for number in columns}
        return self._down(pull(self.node, masked))

    def _down(self, live: dict[Edge, Tensor]) -> Tensor:
        """Columns at the edges where the node takes what the parameter gives, or below, as columns at the parameter."""
        for step in self.path:
            arrived = take(live, step)
            if arrived:
                add(live, pull(step, arrived))
        (found,) = live.values()  # the parameter's edge
        return found

    # The node's second derivative is that of the sum over samples: it is asked for one sample after the other.

    def along(self, name: str, deltas: Mapping[int, Tensor], edge: Edge, tangents: Tensor) -> Tensor | None:
        at_edge = [(k, below) for k, below in enumerate(self.node.node.next_functions) if below == edge]
        step = replace(self.node, inputs=(*self.node.inputs, *at_edge))
        own = dict.fromkeys(below for _, below in self.node.inputs)
        start = {below: tangents.new_zeros(len(tangents), *edge_shape(below)) for below in own} | {edge: tangents}
        found = []
        for delta in self._by_sample(deltas):
            derivative = second_derivative(step, delta)
            if derivative is None:
                return None
            second = derivative(start)
            found.append(self._down({below: second[below] for below in own if below in second}))
        return torch.stack(found, 1) if found else None

    def curved(self, deltas: Mapping[int, Tensor], limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Σ_jk J_jᵀ M_jk J_k of every step on the way to the parameter, M its second derivative and J the rest of the way."""
        (parameter,) = self.parameters.values()
        lives = [
            {(self.node.node, number): part[None] for number, part in delta.items()}
            for delta in self._by_sample(deltas)
        ]
        for step in (self.node, *self.path) if lives else ():
            arrived = [take(live, step) for live in lives]
            if not arrived[0]:
                continue
            found = [second_derivative(step, {number: d[0] for number, d in columns.items()}) for columns in arrived]
            second = [derivative for derivative in found if derivative is not None]
            for edge in second[0].edges if second else ():
                each = 4 * len(lives) * parameter.numel() * parameter.element_size()
                numbers = torch.arange(prod(edge_shape(edge)), device=parameter.device)
                for chosen in numbers.split(max(1, limit // max(1, each))):
                    tangents = {
                        other: parameter.new_zeros(len(chosen), *edge_shape(other)) for other in second[0].edges
                    }
                    tangents[edge].flatten(1).scatter_(1, chosen[:, None], 1.0)
                    there = torch.stack([self._down(derivative(tangents)) for derivative in second], 1)
                    yield self._down({edge: tangents[edge]})[:, None].expand_as(there), there / 2
            for live, columns in zip(lives, arrived, strict=True):
                add(live, pull(step, columns))

    @property
    def linear(self) -> bool:
        return False

    @property
    def twice_differentiable(self) -> bool:
        return all(is_twice_differentiable(step) for step in (self.node, *self.path))

    def _by_sample(self, deltas: Mapping[int, Tensor]) -> Iterator[dict[int, Tensor]]:
        """δ of one sample, zero for all others."""
        for n in range(self.record.samples):
            one = next(iter(deltas.values())).new_tensor([n], dtype=torch.long)
            yield {number: self._only(delta[None], one, self.batches[number])[0] for number, delta in deltas.items()}

    @staticmethod
    def _only(columns: Tensor, n: Tensor, batch: Batch) -> Tensor:
        split = columns.reshape(len(columns), batch.outer, batch.samples, -1)
        own = torch.arange(batch.samples, device=n.device) == n[:, None]
        return (split * own[:, None, :, None].to(split.dtype)).reshape(columns.shape)
