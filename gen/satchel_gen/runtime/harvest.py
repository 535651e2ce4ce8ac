"""What a pass has gathered for each parameter, and the fields that it becomes once all uses have contributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import Tensor

from . import moments
from .blocks import SUM
from .demand import GRADIENT, INPUT, RESIDUALS, Demand, Duty, Source
from .errors import FieldMissing
from .extension import Extension
from .fields import Owner
from .memory import keep
from .modes import in_grad_mode
from .rules import Need, Sizes
from .subsampling import quantities_of
from .torch_private import has_exact_products
from .uses import PER_SAMPLE, Use

_key = attrgetter("key")
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

    def use(self, parameter: Tensor, use: Use) -> Gathered:
        """Note a use with δ [1, *output], where that is asked for."""
        gathered = self.of(parameter)
        gathered.uses.append(use)
        return gathered

    def takes_total(self, gathered: Gathered) -> Use | None:
        """The parameter's only use, if autograd's sum over samples serves what is asked of its δ."""
        parameter, (use, *others) = gathered.parameter, gathered.uses
        factor = use.factor
        if others or factor is None or factor.dtype != parameter.dtype or parameter.dtype not in _EXACT:
            return None
        if not moments.serve(factor) or not any(use.offers(each) for each in self.demand.deviations(use.layer)):
            return None
        return use if has_exact_products() else None

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
        duty = self.demand.duty((use.key,))
        if others or not duty.gradient or use.factor is None:  # without a loss, a walk may find one use alone
            return None
        self._free(parameter, duty)
        found = quantities_of([use], (*duty.gradient, _SUM))
        use.forget()  # a hook may change an operand before another use is reached
        total = found.pop(_SUM, None)
        gathered.ahead = found
        return total

    def reap(self, gathered: Gathered, sizes: Sizes) -> list[Use]:
        """Set the fields of a parameter; its uses."""
        parameter, uses, ahead = gathered.parameter, gathered.uses, gathered.ahead
        results: dict[tuple[Source, Need], Tensor] = {}
        for key, parts in gathered.swept.items():
            results[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
        del self._gathered[id(parameter)]
        gathered.release()
        duty = self.demand.duty(tuple(map(_key, uses)))
        self._free(parameter, duty)
        graph = torch.is_grad_enabled()  # create_graph=True
        found: dict[Need, Tensor] = {}
        if ahead is not None and len(uses) == 1:
            found = ahead
        elif duty.gradient:
            differentiable = graph and self.demand.differentiable
            found = in_grad_mode(differentiable, quantities_of, uses, duty.gradient, differentiable=differentiable)
        for need, tensor in found.items():
            results[GRADIENT, need] = tensor
        if duty.input:
            found = in_grad_mode(False, quantities_of, [Use(use.record, use.name) for use in uses], duty.input)
            for need, tensor in found.items():
                results[INPUT, need] = tensor
        lent = {parameter.data_ptr()}
        for use in uses:
            lent.update(map(Tensor.data_ptr, use.tensors))
        fields: list[Tensor] = []
        for place, asked in zip(duty.features, duty.asked, strict=True):
            extension = self.demand.extensions[place]
            differentiable = graph and extension.differentiable
            value = in_grad_mode(differentiable, _value, extension, asked, uses, results, sizes)
            fields += self._owner.set(parameter, extension.field, value, lent)
        keep(parameter, fields)
        for use in uses:
            use.release()
        return uses

    def _free(self, parameter: Tensor, duty: Duty) -> None:
        """Nothing can be refused any more: the memory of the fields of the pass before may serve again."""
        for place in duty.features:
            vars(parameter).pop(self.demand.extensions[place].field, None)

    def clear(self) -> None:
        for gathered in self._gathered.values():
            gathered.release()
        self._gathered.clear()


def _value(
    extension: Extension,
    asked: Sequence[tuple[Source, Need]],
    uses: Sequence[Use],
    results: Mapping[tuple[Source, Need], Tensor],
    sizes: Sizes,
) -> Tensor | list[Tensor]:
    """A feature from what it asked for, by name; residuals that never arose are absent. Only its own graph is kept."""
    q: dict[str, Tensor] = {}
    for key in asked:
        _, need = key
        tensor = results.get(key)
        if tensor is not None:
            q[need.quantity] = tensor.detach() if tensor.requires_grad and not torch.is_grad_enabled() else tensor
        elif need.source not in RESIDUALS and all(use.offers(need.quantity) for use in uses):
            raise FieldMissing(uses[0].record.where, uses[0].name, [extension.name])  # no sweep has come by
    return extension.value(q, sizes)
