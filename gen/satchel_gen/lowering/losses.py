"""The rules of a loss: gradient, exact factor, Monte-Carlo factor, draws, what a mean divides by, and what must not be negative."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy import Expr, Indexed, IndexedBase

from ..calculus.derive import Statement, needed
from ..calculus.likelihood import Likelihood, likelihood, options
from ..definitions.distributions import Categorical, Distribution
from ..definitions.model import Loss
from ..notation import IndexSum, Option, index_atoms, reads, sigmoid, softplus
from .plan import Axes


@dataclass(frozen=True)
class LossRule:
    """`name[axes] = exprs`, after the intermediates that they read. The first `columns` axes are returned as one."""

    name: str
    axes: Axes
    exprs: tuple[Expr, ...]
    intermediates: tuple[Statement, ...]
    explicit: tuple[Indexed, ...]
    operands: tuple[Indexed, ...]
    numbers: tuple[Option, ...]
    columns: int

    @property
    def expr(self) -> Expr:
        (expr,) = self.exprs
        return expr


@dataclass(frozen=True)
class LoweredLoss:
    """`sample` gives the parameters that outcomes are drawn with; `divisors` are the reductions that depend on the targets.

    `radicands` are what the factors of these names take a square root of, where that is not known to be positive or zero.
    `rules` may have kernels, all others are evaluated by torch.
    """

    loss: Loss
    derived: Likelihood
    rules: tuple[LossRule, ...]
    null: LossRule | None
    sample: LossRule | None
    divisors: dict[str, LossRule]
    radicands: dict[str, LossRule]

    @property
    def columns(self) -> Axes:
        return self.derived.exact.columns

    @property
    def numbers(self) -> tuple[str, ...]:
        return tuple(sorted(option.attribute for option in options(self.loss)))


def lower_loss(loss: Loss) -> LoweredLoss:
    derived = likelihood(loss)
    exact = derived.exact
    axes = tuple(loss.input.indices)
    named = _intermediates(loss)
    sampled = IndexedBase("sampled")[(derived.draws, *loss.outcomes)]

    def rule(name: str, out: Axes, *given: Expr, explicit: tuple[Indexed, ...] = ()) -> LossRule:
        exprs = tuple(_folded(expr, named, loss) for expr in given)
        stages = needed(named, {str(r.base) for expr in exprs for r in reads(expr)})
        values = (*exprs, *(s.value for s in stages))
        read = {str(r.base) for value in values for r in reads(value)}
        read.add(str(loss.input.base))  # a constant factor still has the input's extents
        operands = tuple(t for t in (loss.input, loss.target, *loss.operands) if str(t.base) in read)
        numbers = tuple(sorted({o for value in values for o in value.atoms(Option)}, key=str))
        columns = sum(i in (*exact.columns, derived.draws) for i in out)
        return LossRule(name, out, exprs, stages, explicit, operands, numbers, columns)

    rules = [
        rule("gradient", axes, derived.gradient),
        rule("exact_factor", (*exact.columns, *axes), exact.value),
    ]
    null = None if exact.null is None else rule("null", axes, exact.null)
    sample = None
    if isinstance(loss.distribution, Distribution) and derived.mc_factor is not None:
        mixed = tuple(i for i in axes if i not in loss.outcomes)
        sample = rule("sample", (*loss.outcomes, *mixed), *loss.distribution.parameters)
        rules.append(rule("mc_factor", (derived.draws, *axes), derived.mc_factor, explicit=(sampled,)))
    divisors = {
        name: rule(f"{name}_divisor", (), divisor)
        for name, divisor in loss.reductions.items()
        if isinstance(divisor, IndexSum)
    }

    roots = {"exact_factor": exact.height, "mc_factor": loss.weight if sample is not None else sympy.Integer(1)}
    radicands = {
        factor: rule(f"{factor}_radicand", tuple(i for i in axes if i in index_atoms(root)), root)
        for factor, root in roots.items()
        if not _is_nonnegative(root, loss)
    }
    return LoweredLoss(loss, derived, tuple(rules), null, sample, divisors, radicands)


def _is_nonnegative(expr: Expr, loss: Loss) -> bool:
    """Whether an expression of real numbers is known not to be negative, by its form."""
    sums = {s.name: s.value for s in loss.statements if isinstance(s.value, IndexSum)}

    def slot(read: Indexed) -> sympy.Symbol:
        value = sums.get(str(read.base))
        known = value is not None and _is_nonnegative(value.body, loss)
        return sympy.Symbol(str(read), real=True, nonnegative=known or None)

    functions = {e: sympy.Symbol(str(e), positive=True) for e in expr.atoms(sigmoid, softplus)}
    numbers = {o: sympy.Symbol(o.name, positive=True) for o in expr.atoms(Option)}
    real = expr.xreplace(functions)
    return bool(real.xreplace({r: slot(r) for r in reads(real)} | numbers).is_nonnegative)


def _intermediates(loss: Loss) -> tuple[Statement, ...]:
    """The loss's named intermediates, and the probabilities of its outcomes by name."""
    named = loss.statements[:-1]
    if isinstance(loss.distribution, Categorical):
        (probabilities,) = loss.distribution.parameters
        named += (Statement(IndexedBase("probabilities")[tuple(loss.input.indices)], probabilities),)
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
