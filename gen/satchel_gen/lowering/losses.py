"""The rules of a loss: gradient, exact factor, Monte-Carlo factor, draws and the target's domain."""

from __future__ import annotations

from dataclasses import dataclass

from sympy import Expr, Indexed, IndexedBase

from ..calculus.derive import Statement
from ..calculus.likelihood import Likelihood, likelihood
from ..definitions.model import Categorical, Loss
from ..notation import reads
from .plan import Axes


@dataclass(frozen=True)
class LossRule:
    """`name[axes] = expr`, after the intermediates that it reads. The first `columns` axes are returned as one."""

    name: str
    axes: Axes
    expr: Expr
    intermediates: tuple[Statement, ...]
    explicit: tuple[Indexed, ...]
    operands: tuple[Indexed, ...]
    columns: int


@dataclass(frozen=True)
class LoweredLoss:
    loss: Loss
    derived: Likelihood
    rules: tuple[LossRule, ...]
    draws: LossRule  # the parameter that targets are drawn with: probabilities, or the mean

    @property
    def columns(self) -> Axes:
        return self.derived.columns


def lower_loss(loss: Loss) -> LoweredLoss:
    derived = likelihood(loss)
    axes = tuple(loss.input.indices)
    named = _intermediates(loss)
    sampled = IndexedBase("sampled")[(derived.draws, *loss.target.indices)]

    def rule(name: str, out: Axes, expr: Expr, *explicit: Indexed) -> LossRule:
        expr = _folded(expr, named, loss)
        needed = _needed(expr, named)
        read = {str(r.base) for e in (expr, *(s.value for s in needed)) for r in reads(e)}
        read.add(str(loss.input.base))  # a constant factor still has the input's extents
        operands = tuple(t for t in (loss.input, loss.target) if str(t.base) in read)
        return LossRule(name, out, expr, needed, explicit, operands, sum(i in derived.columns for i in out) or 1)

    if isinstance(loss.distribution, Categorical):
        over = loss.distribution.over
        draws = rule("sample", (*(i for i in axes if i != over), over), loss.distribution.probabilities)
    else:
        draws = rule("sample", axes, loss.distribution.mean)
    rules = (
        rule("gradient", axes, derived.gradient),
        rule("exact_factor", (*derived.columns, *axes), derived.exact_factor),
        rule("mc_factor", (derived.draws, *axes), derived.mc_factor, sampled),
    )
    return LoweredLoss(loss, derived, rules, draws)


def _intermediates(loss: Loss) -> tuple[Statement, ...]:
    """The loss's named intermediates, and the probabilities of its outcomes by name."""
    named = loss.statements[:-1]
    if isinstance(loss.distribution, Categorical):
        named += (Statement(IndexedBase("probabilities")[tuple(loss.input.indices)], loss.distribution.probabilities),)
    return named


def _folded(expr: Expr, named: tuple[Statement, ...], loss: Loss) -> Expr:
    """`expr` with the probabilities by name, at whatever indices they occur."""
    if not isinstance(loss.distribution, Categorical):
        return expr
    statement = named[-1]
    for read in [r for r in reads(expr) if r.base == loss.input.base]:
        where = dict(zip(statement.axes, read.indices, strict=True))
        expr = expr.xreplace({statement.value.xreplace(where): statement.target.xreplace(where)})
    return expr


def _needed(expr: Expr, named: tuple[Statement, ...]) -> tuple[Statement, ...]:
    """The intermediates that `expr` reads, and those that they read, in order."""
    wanted = {str(r.base) for r in reads(expr)}
    kept: list[Statement] = []
    for statement in reversed(named):
        if statement.name in wanted:
            kept.insert(0, statement)
            wanted |= {str(r.base) for r in reads(statement.value)}
    return tuple(kept)
