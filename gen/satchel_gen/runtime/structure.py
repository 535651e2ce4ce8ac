"""The structure of a plan as a value: of passes over graphs of one structure, the first alone is surveyed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from torch.autograd.graph import Node

from .demand import SECOND_ORDER, Demand
from .geometry import Geometry
from .plan import Plan
from .record import Edge
from .settings import current
from .torch_private import axis_structure, node_output_shapes


class Surveyed(NamedTuple):
    """What the first pass has found: the number of samples, and where each layer has them."""

    samples: int
    geometries: tuple[Geometry, ...]


def structure(
    plan: Plan, demand: Demand, start: Mapping[Edge, Sequence[int]], samples: Sequence[int]
) -> Hashable | None:
    """What a survey reads of a plan; None where it reads more: values, or nodes that use parameters or have second derivatives."""
    if plan.loose or (plan.unknown and any(source.kind in SECOND_ORDER for source in demand.sources(plan.definitions))):
        return None
    places: dict[Node, int] = {}
    parameters: dict[int, int] = {}
    found: list[Hashable] = [current().memory_limit, *samples]
    for place, step in enumerate(reversed(plan.steps)):  # inputs before what is computed from them
        node, record = step.node, step.record
        places[node] = place
        if record is not None:
            found += record.structure
        else:
            axes = axis_structure(node)
            if axes is None:
                return None
            found += (axes, *node_output_shapes(node))  # shapes of inputs are those of the outputs below
        found += (len(step.calls), len(step.inputs))
        for call in step.calls:
            for name, p in call.parameters.items():
                found += (name, parameters.setdefault(id(p), len(parameters)), p.shape, p.dtype)
        for position, (below, number) in step.inputs:
            found += (position, places[below], number)
    for (node, number), shape in start.items():
        found += (places.get(node), number, *shape)
    key = tuple(found)
    try:
        hash(key)
    except TypeError:  # a module's option that is no value, as a list
        return None
    return key
