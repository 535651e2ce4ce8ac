"""Rules of layers with named intermediates: accumulated statement by statement, so that the intermediates survive.

Expanding them would cancel (a variance becomes E[x²] − E[x]²) and explode. Jᵀv is accumulated in reverse; the second
derivative, Σ δ ∂²y/∂x∂x′ v, forward through the forward and the reverse statements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
from sympy import Expr, Indexed, IndexedBase

from ..calculus.derive import Derived, Statement, jvp, needed, vjp
from ..calculus.instantiate import Formula
from ..calculus.terms import Term, terms, tidy
from ..definitions.model import Layer
from ..notation import Fresh, Index, LogSumExp, reads
from .plan import Axes, Node, plan_sum

V = Index("v")


@dataclass(frozen=True)
class Stage:
    """A named intermediate of a rule: its formula, and the tree that computes it (None: log-sum-exp of one read)."""

    formula: Formula
    tree: Node | None
    logsumexp: LogSumExp | None = None

    @property
    def name(self) -> str:
        return self.formula.name


def composed_vjp(layer: Layer) -> tuple[Stage, ...]:
    """vjp[v, *input] = Σ_y J[y, x] factor[v, y]; the last stage is the value."""
    cotangent = IndexedBase("factor")[(V, *layer.output.indices)]
    return _needed(layer, vjp(layer.statements, layer.input, cotangent), "vjp")


def composed_hessian(layer: Layer, tangents: Sequence[tuple[Indexed, Indexed]] = ()) -> tuple[Stage, ...] | None:
    """hessian[v, *input] = Σ_{y,x′} delta[y] ∂²y/∂x∂x′ tangent[v, x′], the last stage; None where it vanishes.

    `tangents` are tensors x′ with their tangents, where that is not the input alone.
    """
    fresh = Fresh()
    backward = vjp(layer.statements, layer.input, IndexedBase("delta")[tuple(layer.output.indices)], fresh)
    tangents = tangents or [(layer.input, IndexedBase("tangent")[(V, *layer.input.indices)])]
    derived = jvp([*layer.statements, *_in_output(layer, backward)], tangents, fresh)
    if not derived or str(derived[-1][0].base) != f"dot_{backward[-1][0].base}":
        return None
    return _needed(layer, [*backward[:-1], *derived], "hessian")


def stages_of(layer: Layer, names: Iterable[str]) -> tuple[Stage, ...]:
    """The layer's own intermediates that are needed for `names`, in order."""
    return tuple(map(stage_of, needed(layer.statements[:-1], names)))


def stage_of(statement: Statement) -> Stage:
    """A layer's own intermediate."""
    if isinstance(statement.value, LogSumExp):
        formula = Formula(statement.name, statement.axes, (Term(statement.value),))
        return Stage(formula, None, statement.value)
    return _stage(statement.name, statement.axes, terms(statement.value))


def _stage(name: str, axes: Axes, parts: Sequence[Term]) -> Stage:
    merged = tuple(tidy(term, axes) for term in _merged(parts))
    return Stage(Formula(name, axes, merged), plan_sum(merged, axes))


def _merged(parts: Sequence[Term]) -> list[Term]:
    """Terms that differ in their factor alone as one, with what is common in front."""
    groups: dict[object, list[Term]] = {}
    for part in parts:
        groups.setdefault((part.sums, part.deltas), []).append(part)
    return [
        Term(sympy.factor_terms(sympy.Add(*(part.factor for part in group))), group[0].sums, group[0].deltas)
        for group in groups.values()
    ]


def _needed(layer: Layer, derived: Sequence[Derived], name: str) -> tuple[Stage, ...]:
    """The derived statements that the last one needs, after the layer's intermediates that they read."""
    derived = _in_output(layer, derived)
    wanted = {str(derived[-1][0].base)}
    kept: list[Derived] = []
    for target, parts in reversed(derived):
        if str(target.base) in wanted:
            kept.insert(0, (target, parts))
            wanted |= {str(r.base) for part in parts for r in reads(part.factor)}
    *between, (last, parts) = kept
    stages = [_stage(str(target.base), tuple(target.indices), ps) for target, ps in between]
    return (*stages_of(layer, wanted), *stages, _stage(name, tuple(last.indices), parts))


def _in_output(layer: Layer, derived: Sequence[Derived]) -> list[Derived]:
    """A function of intermediates by its name, and the output by its own where its formula stands: torch keeps it anyway."""
    named = [(s, read) for s in layer.statements[:-1] if s.value.is_Function for read in reads(s.value)]
    last = layer.statements[-1]
    if set(last.axes) == set(layer.input.indices) and not layer.parameters:
        named.append((last, layer.input))
    whole = [(s, read) for s, read in named if set(read.indices) == set(s.axes)]

    def rewritten(factor: Expr) -> Expr:
        for statement, by in whole:
            for read in [r for r in reads(factor) if r.base == by.base]:
                where = dict(zip(by.indices, read.indices, strict=True))
                factor = factor.xreplace({statement.value.xreplace(where): statement.target.xreplace(where)})
        return factor

    return [
        (target, [Term(rewritten(part.factor), part.sums, part.deltas) for part in parts]) for target, parts in derived
    ]
