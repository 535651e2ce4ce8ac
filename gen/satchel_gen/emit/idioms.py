"""Chains of intermediates that one operation of torch computes: without losing digits, or in fewer passes over memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
from sympy import Expr, Indexed, IndexedBase

from ..definitions.standardised import normalised, shift, standardised
from ..lowering.composed import Stage, stage_of
from ..notation import LogSumExp, reads


@dataclass(frozen=True)
class Idiom:
    """The source of an intermediate, and the tensor that it reads."""

    text: str
    read: str


def idioms(stages: Sequence[Stage]) -> dict[str, Idiom]:
    """The intermediates that have one, by name."""
    sums = {IndexedBase(s.name)[s.formula.axes]: s.logsumexp for s in stages if s.logsumexp is not None}
    found = {str(target.base): Idiom(logsumexp(total), str(total.body.base)) for target, total in sums.items()}
    for stage in stages:
        (term, *others) = stage.formula.terms
        if not others and not term.sums and (total := softmax_of(term.factor, sums)) is not None:
            found[stage.name] = Idiom(softmax(total), str(total.body.base))
    return found | _standardised(stages)


def softmax_of(value: Expr, sums: Mapping[Indexed, LogSumExp]) -> LogSumExp | None:
    """The sum that exp(f − log Σ exp f) is a softmax over: it loses the digits of large f unless f is shifted before it is summed."""
    return next((total for target, total in sums.items() if value == sympy.exp(total.body - target)), None)


def softmax(total: LogSumExp) -> str:
    return f"torch.softmax({total.body.base}, {_dims(total)})"


def logsumexp(total: LogSumExp) -> str:
    return f"torch.logsumexp({total.body.base}, {_dims(total)})"


def _dims(total: LogSumExp) -> int | tuple[int, ...]:
    dims = tuple(list(total.body.indices).index(i) for i in total.over)
    return dims[0] if len(dims) == 1 else dims


def _standardised(stages: Sequence[Stage]) -> dict[str, Idiom]:
    """What is standardised over its last axes: three passes for eight."""
    named = {stage.name: stage for stage in stages}
    first = named.get(str(shift))
    if first is None or str(normalised) not in named:
        return {}
    (term,) = first.formula.terms
    (x,) = reads(term.factor)
    over = [i for i in x.indices if i in term.sums]
    same = all(named.get(s.name) == stage_of(s) for s in standardised(x, *over))
    if not same or list(x.indices)[-len(over) :] != over:
        return {}
    return {str(normalised): Idiom(f"standardised({x.base}, {len(over)}, eps)", str(x.base))}
