"""Derivatives of statements in index notation, statement by statement, so that named intermediates survive.

A *statement* defines one tensor: `target[...] = value`. The Jacobian of a statement with respect to a tensor that it reads
is a list of terms with unsolved deltas, which are its structure. Reverse accumulation chains them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
from sympy import Expr, Indexed, IndexedBase

from ..formula import render
from ..notation import ONE, Access, Fresh, Index, LogSumExp, reads
from .terms import CalculusError, Term, contract, terms


@dataclass(frozen=True)
class Statement:
    """`target[indices] = value`; every free index of the value is an index of the target."""

    target: Indexed
    value: Expr

    @property
    def name(self) -> str:
        return str(self.target.base)

    @property
    def axes(self) -> tuple[Index, ...]:
        return tuple(self.target.indices)

    def reads(self, name: str) -> list[Indexed]:
        return [read for read in reads(self.value) if str(read.base) == name]

    def __str__(self) -> str:
        return f"{render(self.target)} = {render(self.value)}"


class Constant(Statement):
    """A statement whose value the last one does not depend on, in exact arithmetic: the shift of a mean, say, that saves digits.

    Derivatives hold it constant; `evaluate.moves_the_last` checks numerically that they may.
    """

    def __str__(self) -> str:
        return f"{super().__str__()}, held constant"


def moving(statements: Sequence[Statement]) -> list[Statement]:
    """Those that derivatives pass through."""
    return [statement for statement in statements if not isinstance(statement, Constant)]


def needed(statements: Sequence[Statement], names: Iterable[str]) -> tuple[Statement, ...]:
    """Those that define `names`, and those that they read, in order."""
    wanted, kept = set(names), list[Statement]()
    for statement in reversed(statements):
        if statement.name in wanted:
            kept.insert(0, statement)
            wanted |= {str(r.base) for r in reads(statement.value)}
    return tuple(kept)


#: A derived statement: its target and the terms that add up to it.
Derived = tuple[Indexed, list[Term]]


def jacobian(statement: Statement, name: str, at: Sequence[Index], wrt: Sequence[Index], fresh: Fresh) -> list[Term]:
    """∂ target[at] / ∂ name[wrt], by this statement's direct reads of `name`.

    `at` and `wrt` are the caller's indices; all others are fresh. The batch index is an index like any other here.
    """
    renamed = dict(zip(statement.axes, at, strict=True))
    if isinstance(statement.value, LogSumExp):
        body, over = statement.value.body, statement.value.over
        inner = {i: fresh(i) for i in over}
        value = statement.target.xreplace(renamed)
        body = body.xreplace({**renamed, **inner})
        weight = sympy.exp(body - value)
        summands = [Term(body, frozenset(inner.values()))]
    else:
        weight = ONE
        summands = [t.freshened(fresh).rename(renamed) for t in terms(statement.value)]
    return [part for summand in summands for part in differentiate(summand, name, wrt, weight)]


def _partial(factor: Expr, read: Indexed) -> Expr:
    """∂ factor / ∂ read, of a real number. A jump has the derivative 0, as torch's kinks do, not a Dirac delta."""
    slots = {r: sympy.Dummy(real=True) for r in reads(factor)}
    partial = factor.xreplace(slots).diff(slots[read])
    found = partial.replace(sympy.DiracDelta, lambda *_: sympy.Integer(0))
    return found.xreplace({slot: r for r, slot in slots.items()})


def vjp(statements: Sequence[Statement], wrt: Indexed, cotangent: Expr, fresh: Fresh | None = None) -> list[Derived]:
    """Reverse accumulation: Σ_out cotangent[out] ∂out/∂wrt as statements, the last one for `wrt`.

    `cotangent` is an expression in the indices of the last statement's target; further free indices of it (a column index)
    become leading axes of every adjoint. An adjoint of an intermediate `t` is named `bar_t`.
    """
    fresh = fresh or Fresh()
    statements = moving(statements)
    last = statements[-1]
    extra = tuple(sorted(cotangent.atoms(Index) - set(last.axes), key=str))
    adjoints: dict[str, tuple[tuple[Index, ...], list[Term]]] = {last.name: (last.axes, [Term(cotangent)])}
    derived: list[Derived] = []
    for statement in reversed(statements):
        if statement.name not in adjoints:
            continue
        axes, parts = adjoints.pop(statement.name)
        if statement is last:
            bar = cotangent
        else:
            head = IndexedBase(f"bar_{statement.name}")[(*extra, *axes)]
            derived.append((head, parts))
            bar = head
        for read_name in dict.fromkeys(str(read.base) for read in reads(statement.value)):
            target_axes = _axes_of(read_name, statements, wrt)
            if target_axes is None:
                continue
            at = fresh.all(statement.axes)
            onto = tuple(target_axes)
            cot = bar.xreplace(dict(zip(axes, at, strict=True)))
            pulled = [contract(Term(cot) * term.summed(at)) for term in jacobian(statement, read_name, at, onto, fresh)]
            if pulled:
                known = adjoints.setdefault(read_name, (onto, []))
                known[1].extend(pulled)
    name = str(wrt.base)
    target, parts = IndexedBase(f"bar_{name}")[(*extra, *wrt.indices)], adjoints.get(name, (wrt.indices, []))[1]
    if derived and _copied(parts) == (same := derived[-1][0]).base[target.indices]:  # the input, shifted
        names = dict(zip(same.indices, target.indices, strict=True))
        parts = [part.rename(names) for part in derived.pop()[1]]
    return [*derived, (target, parts)]


def _copied(parts: Sequence[Term]) -> Expr | None:
    """The value of a term that is nothing but one factor."""
    return parts[0].factor if len(parts) == 1 and parts[0] == Term(parts[0].factor) else None


def jvp(
    statements: Sequence[Statement | Derived], tangents: Sequence[tuple[Indexed, Indexed]], fresh: Fresh
) -> list[Derived]:
    """Forward accumulation: Σ ∂target/∂x · tangent, over tensors x with their tangents, of every target that depends on one,
    named `dot_<target>`.

    The indices that a tangent has more than its tensor (a column index) become leading axes of every derivative.
    """
    wrt, tangent = tangents[0]
    extra = tuple(tangent.indices[: len(tangent.indices) - len(wrt.indices)])
    dots: dict[str, tuple[IndexedBase, tuple[Index, ...]]] = {
        str(x.base): (along.base, tuple(x.indices)) for x, along in tangents
    }
    derived: list[Derived] = []
    for statement in statements:
        if isinstance(statement, Constant):
            continue
        target = statement.target if isinstance(statement, Statement) else statement[0]
        changes: list[Term] = []
        for name, (base, axes) in dots.items():
            through = fresh.all(axes)
            along = Term(base[(*extra, *through)])
            outer = _partials(statement, name, through, fresh)
            changes += [contract((part * along).summed(through)) for part in outer]
        copied = _copied(changes)
        if isinstance(copied, Indexed) and copied.indices == (*extra, *target.indices):
            dots[str(target.base)] = (copied.base, tuple(target.indices))
        elif changes:
            head = IndexedBase(f"dot_{target.base}")
            dots[str(target.base)] = (head, tuple(target.indices))
            derived.append((head[(*extra, *target.indices)], changes))
    return derived


def _partials(statement: Statement | Derived, name: str, wrt: Sequence[Index], fresh: Fresh) -> list[Term]:
    """∂ target / ∂ name[wrt] by direct reads."""
    if isinstance(statement, Statement):
        return jacobian(statement, name, statement.axes, wrt, fresh)
    return [part for term in statement[1] for part in differentiate(term.freshened(fresh), name, wrt)]


def _axes_of(name: str, statements: Sequence[Statement], wrt: Indexed) -> tuple[Index, ...] | None:
    if name == str(wrt.base):
        return tuple(wrt.indices)
    for statement in statements:
        if statement.name == name:
            return statement.axes
    return None


def differentiate(term: Term, name: str, wrt: Sequence[Index], weight: Expr = ONE) -> list[Term]:
    """weight · ∂ term / ∂ name[wrt] by the direct reads of `name` in a term whose bound indices occur nowhere else."""
    if term.square is not None:
        raise CalculusError("cannot differentiate a squared sum")
    derivative = []
    for read in [r for r in reads(term.factor) if str(r.base) == name]:
        positions = [i.args[1] if isinstance(i, Access) else i for i in read.indices]
        deltas = term.deltas + tuple(zip(positions, wrt, strict=True))
        derivative.append(contract(Term(weight * _partial(term.factor, read), term.sums, deltas)))
    return [d for d in derivative if not d.is_zero]


def total_derivative(
    term: Term, name: str, wrt: Sequence[Index], statements: Sequence[Statement], fresh: Fresh
) -> list[Term]:
    """∂ term / ∂ name[wrt], through the named intermediates that the term reads as well."""
    derivative = differentiate(term.freshened(fresh), name, wrt)
    for statement in moving(statements):
        if not any(str(r.base) == statement.name for r in reads(term.factor)):
            continue
        through = fresh.all(statement.axes)
        inner = total_jacobian(statement, name, through, wrt, statements, fresh)
        for outer in differentiate(term.freshened(fresh), statement.name, through):
            derivative += [contract((outer * part.freshened(fresh)).summed(through)) for part in inner]
    return [d for d in derivative if not d.is_zero]


def total_jacobian(
    statement: Statement,
    name: str,
    at: Sequence[Index],
    wrt: Sequence[Index],
    statements: Sequence[Statement],
    fresh: Fresh,
) -> list[Term]:
    """d target[at] / d name[wrt] through the named intermediates of the statement."""
    derivative = jacobian(statement, name, at, wrt, fresh)
    for inner in moving(statements):
        if inner is statement or not statement.reads(inner.name):
            continue
        through = fresh.all(inner.axes)
        outer = jacobian(statement, inner.name, at, through, fresh)
        for part in total_jacobian(inner, name, through, wrt, statements, fresh):
            derivative += [contract((o * part.freshened(fresh)).summed(through)) for o in outer]
    return [d for d in derivative if not d.is_zero]
