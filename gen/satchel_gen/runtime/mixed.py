"""The mixed term 2 Σ δ ∂²y/∂θ∂x · ∂x/∂θ of a layer whose parameter is used again on the way to its input, as in a recurrent network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from .passing import edge_shape, features
from .plan import Call, Plan, Step
from .record import Edge, Record
from .rules import Rule
from .sweep import at_output, sweep
from .uses import PER_SAMPLE, Use, summed


def mixed_terms(plan: Plan, step: Step, delta: Tensor, limit: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """By parameter of the layer, pullbacks t [V, N, *θ] and signs [V, N] with Σ_v ± t² the term's diagonal per sample.

    delta: δ [*output]. The elements x_v of the input are taken one range after the other, of `limit` bytes.
    """
    record = step.record
    assert record is not None
    for name, parameter in step.parameters.items():
        rule = record.definition.parameters[name][PER_SAMPLE]
        below = plan.below(step.node)
        again = [other for other in plan.uses[id(parameter)] if other.node in below]
        if not again or "input" not in rule.operands:  # without it, ∂y/∂θ does not depend on x
            continue
        ((_, edge),) = step.inputs
        shape = edge_shape(edge)
        size = features(shape, record.samples)
        each = 4 * record.samples * parameter.numel() * delta.element_size()
        for chosen in torch.arange(size, device=delta.device).split(max(1, limit // max(1, each))):
            units = delta.new_zeros(len(chosen), record.samples, size)
            units.scatter_(2, chosen[:, None, None].expand(-1, record.samples, 1), 1.0)
            columns = units.reshape(len(chosen), *shape)
            here = _pullback_along(record, rule, parameter, delta, columns)
            there = _summed_pullback(plan, {edge: columns}, again, parameter)
            yield name, *_paired(here, there)


def _pullback_along(record: Record, rule: Rule, parameter: Tensor, delta: Tensor, columns: Tensor) -> Tensor:
    """Σ_y δ_y ∂²y/∂θ∂x v of columns v [V, *edge] → [V, N, *θ]."""
    operands = [record.operand(name) for name in rule.operands]
    place = rule.operands.index("input")
    factor = at_output(record, delta, lead=0)[None]
    v = columns.reshape(len(columns), *record.canonical_input)

    def pullback(x: Tensor) -> Tensor:
        return rule.aten(factor, *operands[:place], x, *operands[place + 1 :])[0]

    x = operands[place].detach()
    found = torch.vmap(lambda tangent: torch.func.jvp(pullback, (x,), (tangent.to(x.dtype),))[1])(v)
    return found.reshape(*found.shape[:2], *parameter.shape)


def _summed_pullback(plan: Plan, start: dict[Edge, Tensor], uses: Sequence[Step], parameter: Tensor) -> Tensor:
    """∂x_v/∂θ over the given uses [V, N, *θ], of columns at the edges of `start`."""
    nodes, found = {use.node for use in uses}, []

    def visit(step: Step | Call, factor: Tensor) -> None:
        if isinstance(step, Step) and step.node in nodes and step.record is not None:
            name = next(name for name, candidate in step.parameters.items() if candidate is parameter)
            found.append(summed([Use(step.record, name, factor)], PER_SAMPLE))

    sweep(plan, start, visit)
    return reduce(add, found)


def _paired(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """2 Σ_v t t′ as Σ ± ((α t ± t′ / α) / √2)², with the α for which both are of one size."""
    ratio = other.norm() / one.norm()
    scale = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0).sqrt()
    left, right = one * scale, other / scale
    signs = one.new_ones(one.shape[:2])
    return torch.cat([left + right, left - right]) * 0.5**0.5, torch.cat([signs, -signs])
