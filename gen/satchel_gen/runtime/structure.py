"""The structure of a plan as a value: of passes over graphs of one structure, the first alone is surveyed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from .axes import Batch
from .demand import SECOND_ORDER, Demand
from .plan import Plan, Step
from .record import Edge
from .settings import current
from .torch_private import axis_structure, node_output_shapes


class Surveyed(NamedTuple):
    """What the first pass has found: the number of samples, and where each layer has them."""

    samples: int
    batches: tuple[Batch, ...]


def structure(
    plan: Plan, demand: Demand, start: Mapping[Edge, Sequence[int]], samples: Sequence[int]
) -> Hashable | None:
    """What a survey reads of a plan; None where it reads more: values, or nodes that use parameters or have second derivatives."""
    if plan.loose or (plan.unknown and any(source.kind in SECOND_ORDER for source in demand.sources(plan.definitions))):
        return None
    places = {step.node: place for place, step in enumerate(plan.steps)}
    parameters: dict[int, int] = {}
    steps: list[Hashable] = []
    for step in plan.steps:
        own = _of_node(step) if step.record is None else step.record.structure
        if own is None:
            return None
        uses = [
            (name, parameters.setdefault(id(p), len(parameters)), p.shape, p.dtype)
            for call in step.calls
            for name, p in call.parameters.items()
        ]
        inputs = [(position, places[node], number) for position, (node, number) in step.inputs]
        steps.append((own, *uses, *inputs))
    starts = [(places.get(node), number, *shape) for (node, number), shape in start.items()]
    key = (*steps, *starts, *samples, current().memory_limit)
    try:
        hash(key)
    except TypeError:  # a module's option that is no value, as a list
        return None
    return key


def _of_node(step: Step) -> Hashable | None:
    """Shapes of inputs are those of the outputs below."""
    own = axis_structure(step.node)
    return None if own is None else (own, node_output_shapes(step.node))
