"""What a parameter adds to the Hessian's diagonal by itself: where its use is not linear, Σ δ ∂²y/∂θ², and the mixed term
2 Σ δ ∂²y/∂θ∂x · ∂x/∂θ where it is used again on the way to the input x, as in a recurrent network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from operator import add

import torch
from torch import Tensor

from .calls import Call
from .passing import edge_shape, features
from .plan import Plan, Step
from .quantities import summed
from .record import Edge
from .sweep import at_edge, sweep
from .uses import PER_SAMPLE, Use


def parameter_terms(
    plan: Plan, step: Step, deltas: Mapping[int, Tensor], limit: int
) -> Iterator[tuple[Call, Tensor, Tensor, Tensor]]:
    """By use and parameter, pullbacks t [V, N, *θ] and signs [V, N] with Σ_v ± t² the terms' diagonal per sample.

    deltas: δ [*output] by output number. What takes columns takes them in ranges of `limit` bytes.
    """
    for call in step.calls:
        for parameter in call.parameters.values():
            for here, there in call.curved(deltas, limit):
                yield call, parameter, *_paired(here, there)
        below = plan.below(step.node)
        for name, parameter in call.parameters.items():
            if any(place.step.node in below for place in plan.uses[id(parameter)]):
                for here, there in _mixed(plan, step, call, name, deltas, limit):
                    yield call, parameter, *_paired(here, there)


def _mixed(
    plan: Plan, step: Step, call: Call, name: str, deltas: Mapping[int, Tensor], limit: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of Σ_y δ_y ∂²y/∂θ∂x_v and ∂x_v/∂θ [V, N, *θ], v over the elements of all inputs."""
    parameter, samples = call.parameters[name], call.record.samples
    for edge in dict.fromkeys(edge for _, edge in step.inputs):
        size = features(edge_shape(edge), samples)
        like = next(iter(deltas.values()))
        each = 4 * samples * parameter.numel() * like.element_size()
        for chosen in torch.arange(size, device=like.device).split(max(1, limit // max(1, each))):
            units = like.new_zeros(len(chosen), samples, size)
            units.scatter_(2, chosen[:, None, None].expand(-1, samples, 1), 1.0)
            columns = at_edge(call.at_input(units, edge), edge, lead=1)
            here = call.along(name, deltas, edge, columns)
            there = None if here is None else _pullback(plan, {edge: columns}, parameter)
            if here is None or there is None:
                break
            yield here, there


def _pullback(plan: Plan, start: dict[Edge, Tensor], parameter: Tensor) -> Tensor | None:
    """∂x_v/∂θ [V, N, *θ] over all uses of θ below the edges of `start`; None if there are none."""
    found: list[Tensor] = []

    def visit(call: Call, factor: Tensor) -> None:
        names = [name for name, candidate in call.parameters.items() if candidate is parameter]
        found.extend(summed([Use(call.record, name, factor)], PER_SAMPLE) for name in names)

    sweep(plan, start, visit)
    return reduce(add, found) if found else None


def _paired(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """2 Σ_v t t′ as Σ ± ((α t ± t′ / α) / √2)², with the α for which both are of one size."""
    ratio = other.norm() / one.norm()
    scale = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0).sqrt()
    left, right = one * scale, other / scale
    signs = one.new_ones(one.shape[:2])
    return torch.cat([left + right, left - right]) * 0.5**0.5, torch.cat([signs, -signs])
