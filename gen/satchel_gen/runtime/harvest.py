"""What a pass has gathered for each parameter, and the fields that it becomes once all uses have contributed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from . import moments
from .blocks import SUM
from .demand import GRADIENT, INPUT, RESIDUALS, Demand, Source
from .errors import FieldMissing
from .extension import Extension
from .fields import Owner, memory_of
from .memory import keep
from .modes import in_grad_mode
from .record import Record
from .rules import Need, Sizes
from .subsampling import quantities_of
from .torch_private import has_exact_products
from .uses import PER_SAMPLE, Use

_SUM = Need("gradient", SUM)
#: Of these, autograd's sums over samples are as exact as ours.
_EXACT = (torch.float32, torch.float64)


class Harvest:
    """Uses of parameters with their δ, and quantities of curvature that sweeps have left."""

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self._parameters: dict[int, Tensor] = {}
        self._uses: dict[int, list[Use]] = {}
        self._curvature: dict[int, dict[tuple[Source, Need], list[Tensor]]] = {}
        self._owner = Owner()
        self._ahead: dict[int, tuple[Use, dict[Need, Tensor]]] = {}
        self._lent: tuple[Record | None, frozenset[int]] = None, frozenset()

    @property
    def pending(self) -> Mapping[int, Tensor]:
        """The parameters that have been reached and have no fields yet, by id."""
        return self._parameters

    def use(self, parameter: Tensor, record: Record, name: str, factor: Tensor | None) -> bool:
        """Note a use with δ [1, *output], where that is asked for; whether it is the parameter's first."""
        key, use = id(parameter), Use(record, name, factor)
        if key in self._uses:
            self._uses[key].append(use)
            return False
        self._parameters[key], self._uses[key] = parameter, [use]
        return True

    def takes_total(self, parameter: Tensor) -> Use | None:
        """The parameter's only use, if autograd's sum over samples serves what is asked of its δ."""
        use, *others = self._uses[id(parameter)]
        if others or not any(use.offers(quantity) for quantity in self.demand.deviations(use.layer)):
            return None
        if use.factor is None or use.factor.dtype != parameter.dtype or parameter.dtype not in _EXACT:
            return None
        return use if moments.serve(use.factor) and has_exact_products() else None

    def accumulate(self, parameter: Tensor, source: Source, found: dict[Need, Tensor]) -> None:
        """Note what a sweep found. Quantities add over columns, spaces and losses; individual columns stand side by side."""
        results = self._curvature.setdefault(id(parameter), {})
        for need, tensor in found.items():
            parts = results.setdefault((source, need), [])
            if parts and need.quantity != PER_SAMPLE:
                parts[0] = parts[0] + tensor
            else:
                parts.append(tensor)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Σ_n g_n of the parameter's first use, if individual gradients are computed for what is asked of δ: these are kept then."""
        use, *others = self._uses[id(parameter)]
        needs = self.demand.needs([use.layer], GRADIENT)
        if others or not needs or use.factor is None:  # without a loss, each use may be found by a walk of its own
            return None
        self._free(parameter, self.serving([use]))
        found = quantities_of([use], (*needs, _SUM))
        total = found.pop(_SUM, None)
        self._ahead[id(parameter)] = use, found
        return total

    def reap(self, parameter: Tensor, unit: float | None) -> list[Use]:
        """Set the fields of a parameter; its uses."""
        key = id(parameter)
        uses, swept = self._uses.pop(key), self._curvature.pop(key, {})
        del self._parameters[key]
        features = self.serving(uses)
        results = {key: parts[0] if len(parts) == 1 else torch.cat(parts) for key, parts in swept.items()}
        self._free(parameter, features)
        graph = torch.is_grad_enabled()  # create_graph=True
        use, ahead = self._ahead.pop(key, (None, {}))
        own = uses == [use]
        found = ahead if own else in_grad_mode(graph and self.demand.differentiable, self._found, uses, GRADIENT)
        for need, tensor in found.items():
            results[GRADIENT, need] = tensor
        for need, tensor in in_grad_mode(False, self._found, uses, INPUT).items():
            results[INPUT, need] = tensor
        sizes = Sizes(uses[0].record.samples, unit)
        lent = {memory_of(parameter)}
        for use in uses:
            lent |= self._memory(use)
        fields: list[Tensor] = []
        for extension in features:
            fields += in_grad_mode(
                graph and extension.differentiable, self._set, parameter, extension, uses, results, sizes, lent
            )
        keep(parameter, fields)
        return uses

    def _set(
        self,
        parameter: Tensor,
        extension: Extension,
        uses: Sequence[Use],
        results: Mapping[tuple[Source, Need], Tensor],
        sizes: Sizes,
        lent: Collection[int],
    ) -> list[Tensor]:
        """Set one field; its tensors."""
        value = extension.value(self._asked(extension, uses, results), sizes)
        return self._owner.set(parameter, extension.field, value, lent)

    def serving(self, uses: Sequence[Use]) -> tuple[Extension, ...]:
        """The features that have a value for a parameter."""
        first, *others = [self.demand.serving(use.layer, use.name) for use in uses]
        return tuple(e for e in first if all(e in other for other in others)) if others else first

    def _memory(self, use: Use) -> frozenset[int]:
        """Where the memory begins of what a use is computed from, which the parameters of a call share."""
        call, found = self._lent
        if call is not use.record:
            found = frozenset(map(memory_of, use.tensors))
            self._lent = use.record, found
        return found

    @staticmethod
    def _free(parameter: Tensor, features: Sequence[Extension]) -> None:
        """Nothing can be refused any more: the memory of the fields of the pass before may serve again."""
        for extension in features:
            vars(parameter).pop(extension.field, None)

    def clear(self) -> None:
        self._parameters.clear()
        self._uses.clear()
        self._ahead.clear()
        self._lent = None, frozenset()
        self._curvature.clear()

    def _found(self, uses: Sequence[Use], source: Source) -> dict[Need, Tensor]:
        """What needs no sweep."""
        needs = self.demand.needs([use.layer for use in uses], source)
        if not needs:
            return {}
        own = uses if source is GRADIENT else [Use(use.record, use.name) for use in uses]
        return quantities_of(own, needs, differentiable=torch.is_grad_enabled())

    def _asked(
        self, extension: Extension, uses: Sequence[Use], results: Mapping[tuple[Source, Need], Tensor]
    ) -> dict[str, Tensor]:
        """What a feature asked for, by name; residuals that never arose are absent. Only its graph is kept."""
        q: dict[str, Tensor] = {}
        for key in self.demand.asked(extension, uses[0].layer):
            _, need = key
            if key in results:
                q[need.quantity] = results[key]
            elif need.source not in RESIDUALS and all(use.offers(need.quantity) for use in uses):
                raise FieldMissing(uses[0].record.where, uses[0].name, [extension.name])  # no sweep has come by
        if torch.is_grad_enabled() or not any([tensor.requires_grad for tensor in q.values()]):
            return q
        return {name: tensor.detach() for name, tensor in q.items()}
