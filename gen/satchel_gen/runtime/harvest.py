"""What a pass has gathered for each parameter, and the fields that it becomes once all uses have contributed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .demand import RESIDUALS, Demand, Source, source
from .errors import FieldMissing
from .extension import Extension
from .fields import Owner
from .memory import keep
from .record import Record
from .rules import Need, Sizes
from .subsampling import quantities_of
from .uses import PER_SAMPLE, Use

GRADIENT, INPUT = Source("gradient"), Source("input")


class Harvest:
    """Uses of parameters with their δ, and quantities of curvature that sweeps have left."""

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self._parameters: dict[int, Tensor] = {}
        self._uses: dict[int, list[Use]] = {}
        self._curvature: dict[int, dict[tuple[Source, Need], list[Tensor]]] = {}
        self._owner = Owner()

    def pending(self) -> list[int]:
        """Ids of the parameters that have been reached and have no fields yet."""
        return list(self._uses)

    def use(self, parameter: Tensor, record: Record, name: str, factor: Tensor | None) -> bool:
        """Note a use with δ [1, *output], where that is asked for; whether it is the parameter's first."""
        first = id(parameter) not in self._uses
        self._parameters[id(parameter)] = parameter
        self._uses.setdefault(id(parameter), []).append(Use(record, name, factor))
        return first

    def accumulate(self, parameter: Tensor, source: Source, found: dict[Need, Tensor]) -> None:
        """Note what a sweep found. Quantities add over columns, spaces and losses; individual columns stand side by side."""
        results = self._curvature.setdefault(id(parameter), {})
        for need, tensor in found.items():
            parts = results.setdefault((source, need), [])
            if parts and need.quantity != PER_SAMPLE:
                parts[0] = parts[0] + tensor
            else:
                parts.append(tensor)

    def reap(self, key: int, unit: float | None) -> list[Use]:
        """Set the fields of a parameter; its uses."""
        parameter, uses, swept = self._parameters.pop(key), self._uses.pop(key), self._curvature.pop(key, {})
        for extension in self.demand.extensions:
            extension.check(uses[0].record.samples)
        results = {key: parts[0] if len(parts) == 1 else torch.cat(parts) for key, parts in swept.items()}
        features = self.extensions(uses)
        for extension in features:  # nothing can be refused any more, and their memory may serve again
            vars(parameter).pop(extension.field, None)
        graph = torch.is_grad_enabled()  # create_graph=True
        with torch.set_grad_enabled(graph and any(e.differentiable for e in self.demand.extensions)):
            results |= self._of_gradient(uses)
        with torch.no_grad():
            results |= self._of_input(uses)
        sizes = Sizes(uses[0].record.samples, unit)
        self._owner.lend([parameter, *(use.factor for use in uses if use.factor is not None)])
        self._owner.lend([tensor for use in uses for tensor in use.record.tensors.values()])
        fields: list[Tensor] = []
        for extension in features:
            with torch.set_grad_enabled(graph and extension.differentiable):
                q = self._asked(extension, uses, results)
                fields += self._owner.set(parameter, extension.field, extension.value(q, sizes))
        keep(parameter, fields)
        return uses

    def extensions(self, uses: Sequence[Use]) -> list[Extension]:
        """The features that have a value for a parameter."""
        return [extension for extension in self.demand.extensions if all(use.serves(extension) for use in uses)]

    def clear(self) -> None:
        self._parameters.clear()
        self._uses.clear()
        self._curvature.clear()

    def _of_gradient(self, uses: list[Use]) -> dict[tuple[Source, Need], Tensor]:
        needs = self.demand.needs((use.layer for use in uses), GRADIENT)
        found = quantities_of(uses, needs, differentiable=torch.is_grad_enabled())
        return {(GRADIENT, need): tensor for need, tensor in found.items()}

    def _of_input(self, uses: list[Use]) -> dict[tuple[Source, Need], Tensor]:
        needs = self.demand.needs((use.layer for use in uses), INPUT)
        found = quantities_of([Use(use.record, use.name) for use in uses], needs)
        return {(INPUT, need): tensor for need, tensor in found.items()}

    def _asked(
        self, extension: Extension, uses: Sequence[Use], results: dict[tuple[Source, Need], Tensor]
    ) -> dict[str, Tensor]:
        """What a feature asked for, by name; residuals that never arose are absent. Only its graph is kept."""
        q: dict[str, Tensor] = {}
        for need in extension.needs(uses[0].layer):
            key = source(extension, need), need
            if key in results:
                q[need.quantity] = results[key]
            elif need.source not in RESIDUALS and all(use.offers(need.quantity) for use in uses):
                raise FieldMissing(uses[0].record.where, uses[0].name, [extension.name])  # no sweep has come by
        return q if torch.is_grad_enabled() else {name: tensor.detach() for name, tensor in q.items()}
