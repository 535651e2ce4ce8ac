"""What a pass has gathered for each parameter, and the fields that it becomes once all uses have contributed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

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


@dataclass(eq=False)
class Gathered:
    """What has reached a parameter: its uses with their δ, and what sweeps have left, by what it was asked for.

    ahead: what is asked of δ, where it has been computed with the first use's gradient. waits: whether the sum of the pullbacks that
    autograd is about to compute serves, too.
    """

    parameter: Tensor
    uses: list[Use] = field(default_factory=list)
    swept: dict[tuple[Source, Need], list[Tensor]] = field(default_factory=dict)
    ahead: dict[Need, Tensor] | None = None
    waits: bool = False

    def release(self) -> None:
        """Drop all tensors: a hook on the parameter's node holds this until the pass ends."""
        self.uses, self.swept, self.ahead = [], {}, None


class Harvest:
    """What a pass has gathered for the parameters that have no fields yet."""

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self._gathered: dict[int, Gathered] = {}
        self._owner = Owner()
        self._lent: tuple[Record | None, frozenset[int]] = None, frozenset()

    @property
    def pending(self) -> list[Gathered]:
        """The parameters that have been reached."""
        return [gathered for gathered in self._gathered.values() if gathered.uses]

    def of(self, parameter: Tensor) -> Gathered:
        """What has reached a parameter."""
        key = id(parameter)
        found = self._gathered.get(key)
        if found is None:
            found = self._gathered[key] = Gathered(parameter)
        return found

    def use(self, parameter: Tensor, use: Use) -> None:
        """Note a use with δ [1, *output], where that is asked for."""
        self.of(parameter).uses.append(use)

    def takes_total(self, parameter: Tensor) -> Use | None:
        """The parameter's only use, if autograd's sum over samples serves what is asked of its δ."""
        use, *others = self.of(parameter).uses
        if others or not any(use.offers(quantity) for quantity in self.demand.deviations(use.layer)):
            return None
        if use.factor is None or use.factor.dtype != parameter.dtype or parameter.dtype not in _EXACT:
            return None
        return use if moments.serve(use.factor) and has_exact_products() else None

    def accumulate(self, parameter: Tensor, source: Source, found: dict[Need, Tensor]) -> None:
        """Note what a sweep found. Quantities add over columns, spaces and losses; individual columns stand side by side."""
        swept = self.of(parameter).swept
        for need, tensor in found.items():
            parts = swept.setdefault((source, need), [])
            if parts and need.quantity != PER_SAMPLE:
                parts[0] = parts[0] + tensor
            else:
                parts.append(tensor)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Σ_n g_n of the parameter's first use, if individual gradients are computed for what is asked of δ: these are kept then."""
        gathered = self.of(parameter)
        use, *others = gathered.uses
        needs = self.demand.needs([use.layer], GRADIENT)
        if others or not needs or use.factor is None:  # without a loss, each use may be found by a walk of its own
            return None
        self._free(parameter, self.serving([use]))
        found = quantities_of([use], (*needs, _SUM))
        total = found.pop(_SUM, None)
        gathered.ahead = found
        return total

    def reap(self, gathered: Gathered, unit: float | None) -> list[Use]:
        """Set the fields of a parameter; its uses."""
        parameter, uses, ahead = gathered.parameter, gathered.uses, gathered.ahead
        results = {key: parts[0] if len(parts) == 1 else torch.cat(parts) for key, parts in gathered.swept.items()}
        del self._gathered[id(parameter)]
        gathered.release()
        features = self.serving(uses)
        self._free(parameter, features)
        graph = torch.is_grad_enabled()  # create_graph=True
        layers = [use.layer for use in uses]
        if ahead is not None and len(uses) == 1:
            results.update({(GRADIENT, need): tensor for need, tensor in ahead.items()})
        elif needs := self.demand.needs(layers, GRADIENT):
            differentiable = graph and self.demand.differentiable
            found = in_grad_mode(differentiable, quantities_of, uses, needs, differentiable=differentiable)
            results.update({(GRADIENT, need): tensor for need, tensor in found.items()})
        if needs := self.demand.needs(layers, INPUT):
            found = in_grad_mode(False, quantities_of, [Use(use.record, use.name) for use in uses], needs)
            results.update({(INPUT, need): tensor for need, tensor in found.items()})
        sizes = Sizes(uses[0].record.samples, unit)
        lent = self._memory(parameter, uses)
        fields: list[Tensor] = []
        for extension in features:
            fields += in_grad_mode(
                graph and extension.differentiable, self._set, parameter, extension, uses, results, sizes, lent
            )
        keep(parameter, fields)
        for use in uses:
            use.release()
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

    def _memory(self, parameter: Tensor, uses: Sequence[Use]) -> set[int]:
        """Where the memory begins of a parameter and of what its uses are computed from, which the parameters of a call share."""
        begins = {memory_of(parameter)}
        for use in uses:
            call, found = self._lent
            if call is not use.record:
                found = frozenset(map(memory_of, use.tensors))
                self._lent = use.record, found
            begins |= found
        return begins

    @staticmethod
    def _free(parameter: Tensor, features: Sequence[Extension]) -> None:
        """Nothing can be refused any more: the memory of the fields of the pass before may serve again."""
        for extension in features:
            vars(parameter).pop(extension.field, None)

    def clear(self) -> None:
        for gathered in self._gathered.values():
            gathered.release()
        self._gathered.clear()
        self._lent = None, frozenset()

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
