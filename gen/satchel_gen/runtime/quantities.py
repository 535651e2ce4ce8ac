"""The quantities of one parameter, from all its uses.

Several uses are one with more outputs. Where the layers are of one kind and have an axis that any number of positions share, their
tensors are joined along it. Otherwise what adds over the uses (individual pullbacks, say) is summed, and all else is reduced from that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from math import prod
from operator import add
from typing import Any

from torch import Tensor

from .blocks import Blockwise, in_blocks
from .cost import Program, cheapest
from .errors import SharedByKinds
from .evaluate import evaluate, uses_kernel
from .memory import FRESH
from .rules import registry
from .uses import PER_SAMPLE, Use, alike, join, joinable, shaped


def quantities(
    uses: Sequence[Use], names: Iterable[str], *extra: Tensor, differentiable: bool = False
) -> dict[str, Tensor]:
    """The quantities `names` of one parameter; `extra` is what their rules take after the factor."""
    names = [name for name in names if all(use.offers(name) for use in uses)]
    if len(uses) > 1 and not joinable(uses):
        return _totalled(uses, names, extra, differentiable)
    return _Joined(uses, extra).of(names, differentiable)


def _totalled(
    uses: Sequence[Use], names: Iterable[str], extra: Sequence[Tensor], differentiable: bool
) -> dict[str, Tensor]:
    """Totals of what is additive over uses, and reductions of these."""
    totals: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name in names:
        if name in registry().factors and not alike(uses):
            raise SharedByKinds([use.record.where for use in uses], uses[0].name, name)
        reduction = registry().reductions.get(name)
        of = name if reduction is None else reduction.of
        if of not in totals:
            totals[of] = summed(uses, of, differentiable)
        if reduction is None:
            found[name] = totals[of]
        else:
            more = [sum(use.positions for use in uses)] if reduction.positions else extra
            found[name] = reduction.function(totals[of], *more)
    return found


def summed(uses: Sequence[Use], name: str, differentiable: bool = False) -> Tensor:
    """A quantity that is additive over uses."""
    given = [(use, () if use.factor is None else (use.factor,)) for use in uses]
    return reduce(add, (use.value(name, *factor, differentiable=differentiable) for use, factor in given))


class _Joined:
    """Uses as one, joined along their shared axis."""

    def __init__(self, uses: Sequence[Use], extra: Sequence[Tensor]) -> None:
        self.uses, self.first, self.extra = uses, uses[0], extra
        self.layer = self.first.layer
        self.rules = self.layer.parameters[self.first.name]
        factors = [use.factor for use in uses if use.factor is not None]
        self.factor = join(factors, self.layer.output_axes, 1) if factors else None
        self._operands: dict[str, Any] = {}

    def of(self, names: Sequence[str], differentiable: bool) -> dict[str, Tensor]:
        found = {} if differentiable or self.factor is None else self._cheapest(names)
        memo = self.first.memo if len(self.uses) == 1 else {}
        for name in names:
            rule = self.rules[name]
            if name not in found and rule.aten in memo:
                found[name] = memo[rule.aten]
            elif name not in found:
                given = self._given(name)
                found[name] = evaluate(rule, self.layer, self._operand, *given, differentiable=differentiable)
                if not rule.operands:
                    memo[rule.aten] = found[name]
        return {name: shaped(self.rules[name], self.first, found[name]) for name in names}

    def _operand(self, name: str) -> Any:
        if name not in self._operands:
            axes = {"input": self.layer.input_axes, "output": self.layer.output_axes}.get(name)
            values = [use.record.operand(name) for use in (self.uses if axes is not None else self.uses[:1])]
            self._operands[name] = values[0] if axes is None else join(values, axes, 0)
        return self._operands[name]

    def _given(self, name: str) -> list[Tensor]:
        """What a rule takes in front of its operands."""
        return [*([] if self.factor is None else [self.factor]), *(self.extra if name != PER_SAMPLE else ())]

    def _cheapest(self, names: Sequence[str]) -> dict[str, Tensor]:
        """What has several programs, by its cheapest; and individual pullbacks, where blocks of them serve that, too."""
        values: dict[str, list[Any]] = {}
        choices: dict[str, tuple[Program, ...]] = {}
        for name in names:
            rule = self.rules[name]
            own = [*self._given(name), *map(self._operand, rule.operands)]
            if isinstance(rule.aten, cheapest) and not uses_kernel(rule, own):
                values[name], choices[name] = own, rule.aten.ranked(*own)
        found = self._in_blocks(names, choices)
        rest = {name: best for name, (best, *_) in choices.items() if name not in found}
        return found | {name: best.run(*values[name]) for name, best in rest.items()}

    def _in_blocks(self, names: Sequence[str], choices: Mapping[str, Sequence[Program]]) -> dict[str, Tensor]:
        """What is cheapest by blocks of the same individual pullbacks, and these where they are asked for."""
        assert self.factor is not None
        rule = self.rules[PER_SAMPLE]
        keep = PER_SAMPLE in names and not uses_kernel(rule, [self.factor])
        if not keep and not any(isinstance(best.function, Blockwise) for best, *_ in choices.values()):
            return {}
        together = [
            name
            for name, (best, *others) in choices.items()
            if isinstance(best.function, Blockwise)
            or any(isinstance(p.function, Blockwise) and p.seconds_among_others <= best.seconds for p in others)
        ]
        each = self.first.record.parameter(self.first.name).numel()
        stored = each * prod(self.factor.shape[:2]) * self.factor.element_size()
        if len(together) + keep < 2 and not (keep and stored >= FRESH):
            return {}
        found, kept = in_blocks(
            rule.aten,
            {name: registry().reductions[name] for name in together},
            self.factor,
            [self._operand(name) for name in rule.operands],
            each,
            self.extra,
            by_sample=sum(name in ("input", "output") for name in rule.operands),
            keep=keep,
        )
        return found if kept is None else found | {PER_SAMPLE: kept}
