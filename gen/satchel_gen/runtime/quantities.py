"""The quantities of one parameter, from all its uses.

Several uses are one with more outputs. Where the layers are of one kind and have an axis that any number of positions share, their
tensors are joined along it. Otherwise what adds over the uses (individual pullbacks, say) is summed, and all else is reduced from that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

from torch import Tensor

from . import moments
from .blocks import SUM, SUMMED, Blockwise, in_blocks
from .cost import Program, cheapest
from .errors import SharedByKinds
from .evaluate import evaluate, uses_kernel
from .memory import FRESH, copied, room
from .rules import Rule, registry
from .uses import PER_SAMPLE, Use, alike, joinable, joined, shaped


def quantities(
    uses: Sequence[Use], names: Iterable[str], *extra: Tensor, differentiable: bool = False
) -> dict[str, Tensor]:
    """The quantities `names` of one parameter; `extra` is what their rules take after the factor.

    `SUM` is there where blocks of individual pullbacks serve the other quantities, too: otherwise autograd computes it as fast.
    """
    if len(uses) > 1 and not joinable(uses):
        return _totalled(uses, [name for name in names if all(use.offers(name) for use in uses)], extra, differentiable)
    use = uses[0] if len(uses) == 1 else joined(uses)
    rules: dict[str, Rule] = {}
    several = False
    for name in names:
        rule = use.rules.get(name)
        if rule is not None:
            rules[name] = rule
            several = several or isinstance(rule.aten, cheapest)
    found: dict[str, Tensor] = {}
    if not differentiable and use.factor is not None and (several or _by_blocks(use, rules, SUM in names)):
        found = _cheapest(use, rules, extra, SUM in names)
    values: dict[str, Tensor] = {}
    for name, rule in rules.items():
        if name in found:
            value = found[name]
        elif rule.aten in use.memo:  # another parameter's field by now, which a hook may change
            value = copied(use.memo[rule.aten], use.parameter)
        else:
            place = room(use.parameter) if rule.writes else None
            given = _given(use, name, extra)
            value = evaluate(rule, use.layer, use.operand, *given, differentiable=differentiable, out=place)
            if not rule.operands:
                use.memo[rule.aten] = value
        values[name] = value if rule.lead is None else shaped(rule, use, value)
    if SUM in found:
        values[SUM] = found[SUM].reshape(use.parameter.shape)
    return values


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


def _given(use: Use, name: str, extra: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a rule takes in front of its operands."""
    own = () if use.factor is None else (use.factor,)
    return own if name == PER_SAMPLE else (*own, *extra)


def _cheapest(use: Use, rules: Mapping[str, Rule], extra: Sequence[Tensor], summed: bool) -> dict[str, Tensor]:
    """What has several programs, by its cheapest; and individual pullbacks, where blocks of them serve that, too.

    Squared deviations by the second moment and autograd's sum, where that is known.
    """
    seconds = {} if use.total is None else _seconds(use, rules)
    if not seconds:
        return _ranked(use, rules, extra, summed)
    assert use.factor is not None
    taken = {name: rule for name, rule in rules.items() if name not in seconds}
    found = _ranked(use, taken | {second: use.rules[second] for second in seconds.values()}, extra, summed)
    for name, second in seconds.items():
        squares, total = found[second], use.total
        assert total is not None
        gradient, spent = total.gradient.reshape(squares.shape), second not in rules
        value = moments.difference(squares, gradient, use.factor.shape[1], spent)
        found |= _ranked(use, {name: rules[name]}, extra, False) if value is None else {name: value}
    return {name: value for name, value in found.items() if name in rules or name == SUM}


def _seconds(use: Use, rules: Mapping[str, Rule]) -> dict[str, str]:
    """Squared deviations that have several programs and that autograd's sum serves; with the second moment of each."""
    if use.total is None or use.factor is None or not use.total.unchanged or not moments.serve(use.factor):
        return {}
    costly = [name for name, rule in rules.items() if isinstance(rule.aten, cheapest)]
    found = {name: second for name in costly if (second := registry().second_moment(name)) is not None}
    return {name: second for name, second in found.items() if not uses_kernel(use.rules[second], [use.factor])}


def _ranked(use: Use, rules: Mapping[str, Rule], extra: Sequence[Tensor], summed: bool) -> dict[str, Tensor]:
    """Each by its cheapest program, or several by the same blocks."""
    values: dict[str, list[Any]] = {}
    choices: dict[str, tuple[Program, ...]] = {}
    for name, rule in rules.items():
        if isinstance(rule.aten, cheapest):
            own = [*_given(use, name, extra), *map(use.operand, rule.operands)]
            if not uses_kernel(rule, own):
                ranked = rule.aten.ranked(*own)
                values[name], choices[name] = own, tuple(sorted(ranked, key=_beside_gradient)) if summed else ranked
    found = _in_blocks(use, rules, extra, choices, summed)
    for name, (best, *_) in choices.items():
        if name not in found:
            found[name] = best.run(*values[name], out=room(use.parameter) if best.writes else None)
    return found


def _beside_gradient(program: Program) -> float:
    return program.seconds_beside_gradient if isinstance(program.function, Blockwise) else program.seconds


def _in_blocks(
    use: Use,
    rules: Mapping[str, Rule],
    extra: Sequence[Tensor],
    choices: Mapping[str, Sequence[Program]],
    summed: bool,
) -> dict[str, Tensor]:
    """What is cheapest by blocks of the same individual pullbacks, and these where they are asked for."""
    assert use.factor is not None
    keep = PER_SAMPLE in rules and not uses_kernel(rules[PER_SAMPLE], [use.factor])
    if not keep and not any([isinstance(best.function, Blockwise) for best, *_ in choices.values()]):
        return {}
    rule = use.rules[PER_SAMPLE]
    together = [name for name, ranked in choices.items() if _is_blockwise(ranked)]
    if len(together) + keep + summed < 2 and not (keep and _outgrows(use, rule)):
        return {}
    reductions = {name: registry().reductions[name] for name in together}
    if summed:
        reductions[SUM] = SUMMED
    found, kept = in_blocks(
        rule.aten,
        reductions,
        use.factor,
        [use.operand(name) for name in rule.operands],
        use.shape,
        extra,
        by_sample=len([name for name in rule.operands if name in ("input", "output")]),
        keep=use.parameter if keep else None,
        writes=rule.writes,
    )
    if kept is not None:
        found[PER_SAMPLE] = kept
    return found


def _is_blockwise(ranked: Sequence[Program]) -> bool:
    """Whether the best program is by blocks, or one is where others need these anyway."""
    best, *others = ranked
    return isinstance(best.function, Blockwise) or any(
        isinstance(p.function, Blockwise) and p.seconds_among_others <= best.seconds for p in others
    )


def _by_blocks(use: Use, rules: Mapping[str, Rule], summed: bool) -> bool:
    """Whether individual pullbacks are computed in blocks even where nothing else is."""
    rule = rules.get(PER_SAMPLE)
    return rule is not None and (summed or _outgrows(use, rule))


def _outgrows(use: Use, rule: Rule) -> bool:
    """Whether individual pullbacks are too large for a rule that cannot write them to memory that is there."""
    assert use.factor is not None
    V, N = use.factor.shape[:2]
    return not rule.writes and V * N * use.parameter.numel() * use.factor.element_size() >= FRESH
