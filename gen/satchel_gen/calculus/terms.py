"""Terms: Σ_sums Π δ · factor · (square)². The normal form in which formulas are differentiated and simplified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import sympy
from sympy import Expr

from ..formula import render_term
from ..notation import ONE, Access, Equal, Fresh, Index, IndexSum, index_atoms, plain_names, reads

#: δ(a, b): two indices, or one and a position that is affine in others.
Delta = tuple[Expr, Expr]


class CalculusError(ValueError):
    """A formula that the calculus cannot treat; the message names it."""


@dataclass(frozen=True)
class Term:
    """Σ_{sums} Π_{(a,b) ∈ deltas} δ(a,b) · factor · (square)²; `factor` holds no sum.

    `centred` belongs to a `square`: the index over which its mean is subtracted before it is squared.
    """

    factor: Expr
    sums: frozenset[Index] = frozenset()
    deltas: tuple[Delta, ...] = ()
    square: Term | None = None
    centred: Index | None = None

    @property
    def free(self) -> set[Index]:
        """The indices that the value depends on."""
        inside = index_atoms(self.factor) | {i for delta in self.deltas for side in delta for i in index_atoms(side)}
        if self.square is not None:
            inside |= self.square.free
        return inside - self.sums

    @property
    def is_zero(self) -> bool:
        return self.factor == 0 or (self.square is not None and self.square.is_zero)

    def rename(self, names: Mapping[Index, Index]) -> Term:
        if not names:
            return self
        return Term(
            self.factor.xreplace(dict(names)),
            frozenset(names.get(i, i) for i in self.sums),
            tuple((a.xreplace(dict(names)), b.xreplace(dict(names))) for a, b in self.deltas),
            self.square.rename(names) if self.square is not None else None,
            names.get(self.centred, self.centred) if self.centred is not None else None,
        )

    def bound(self) -> set[Index]:
        return set(self.sums) | (self.square.bound() if self.square is not None else set())

    def freshened(self, fresh: Fresh) -> Term:
        """The same value with bound indices that occur nowhere else."""
        return self.rename({index: fresh(index) for index in sorted(self.bound(), key=str)})

    def __mul__(self, other: Term) -> Term:
        """The product. The bound indices of both must already differ (`freshened`)."""
        if self.square is not None and other.square is not None:
            raise CalculusError("a product of two squared sums has no program")
        if self.centred is not None or other.centred is not None:
            raise CalculusError("a centred sum can only be squared")
        return Term(
            self.factor * other.factor,
            self.sums | other.sums,
            self.deltas + other.deltas,
            self.square if self.square is not None else other.square,
        )

    def summed(self, over: Iterable[Index]) -> Term:
        return replace(self, sums=self.sums | frozenset(over))

    def squared(self) -> Term:
        """(·)²: a term without sums squares factor by factor, which is what separates squares of products."""
        if self.square is not None:
            raise CalculusError("the square of a squared sum has no program")
        if not self.sums and self.centred is None:
            return replace(self, factor=self.factor**2)
        inner = contract(self)
        if not inner.sums and self.centred is None:
            return replace(inner, factor=inner.factor**2)
        outside = tuple(delta for delta in inner.deltas)
        return Term(ONE, frozenset(), outside, replace(inner, deltas=()))

    def __str__(self) -> str:
        return render_term(self)


def contract(term: Term) -> Term:
    """Solve every delta of two indices that touches a summed one: Σ_a δ(a,b) f(a) = f(b). Unsolved deltas are the structure."""
    if term.square is not None:
        term = replace(term, square=contract(term.square))
    pending = list(term.deltas)
    kept: list[Delta] = []
    while pending:
        a, b = pending.pop(0)
        if a == b:
            continue
        if not (isinstance(a, Index) and isinstance(b, Index)):
            kept.append((a, b))
            continue
        if b in term.sums and (a not in term.sums or a.name < b.name):
            a, b = b, a
        if a in term.sums:
            names = {a: b}
            pending = [(p.xreplace(names), q.xreplace(names)) for p, q in pending]
            kept = [(p.xreplace(names), q.xreplace(names)) for p, q in kept]
            rest = replace(term, deltas=()).rename(names)
            term = replace(rest, sums=term.sums - {a})
        else:
            kept.append((a, b))
    unique = dict.fromkeys(tuple(sorted(delta, key=str)) for delta in kept)
    return replace(term, deltas=tuple(unique))


def solve(term: Term, cotangent: str) -> Term:
    """Solve the deltas of a position, δ(u, s·h + d·a − p), for an index of the cotangent: h = (u + p − d·a) / s.

    What the cotangent is read at is an `Access`: zero outside its range and where h is not an integer.
    """
    for pair in [pair for pair in term.deltas if not all(isinstance(side, Index) for side in pair)]:
        index, position = pair if isinstance(pair[0], Index) else pair[::-1]
        (read,) = [r for r in reads(term.factor) if str(r.base) == cotangent]
        unknown = next((i for i in read.indices if i in term.sums and i in index_atoms(position)), None)
        if unknown is None or sum(unknown in index_atoms(r) for r in reads(term.factor)) != 1:
            raise CalculusError(f"no index of {read} solves δ({index}, {position})")
        position = sympy.expand(position)
        slope = position.coeff(unknown)
        solution = sympy.expand((index - (position - slope * unknown)) / slope)
        axis = Index(unknown.name.split("#")[0], unknown.many)
        at = [Access(axis, solution, index) if i == unknown else i for i in read.indices]
        rest = tuple(delta for delta in term.deltas if delta is not pair)
        term = Term(term.factor.xreplace({read: read.base[tuple(at)]}), term.sums - {unknown}, rest)
    return term


def tidy(term: Term, axes: Iterable[Index]) -> Term:
    """Readable bound names, chosen in order of appearance; `axes` are the names that are taken."""
    taken = [*axes, *term.free]
    return term.rename(plain_names(taken, sorted(term.bound(), key=_creation)))


def _creation(index: Index) -> tuple[str, int]:
    name, _, number = index.name.partition("#")
    return (name, int(number or -1))


def terms(expr: Expr) -> list[Term]:
    """The normal form of an expression without squares of sums: a list of terms to add."""
    if not expr.has(IndexSum):
        return [Term(expr)]
    expr = sympy.expand_mul(expr, deep=False) if not isinstance(expr, IndexSum) else expr
    if isinstance(expr, sympy.Add):
        return [term for part in expr.args for term in terms(part)]
    if isinstance(expr, IndexSum):
        return [term.summed(expr.over) for term in terms(expr.body)]
    if isinstance(expr, sympy.Mul):
        product = [Term(ONE)]
        for part in expr.args:
            product = [
                left * right for left in product for right in (terms(part) if part.has(IndexSum) else [Term(part)])
            ]
        return product
    if expr.has(IndexSum):
        raise CalculusError(f"a sum inside {expr.func.__name__} must be a named intermediate: {expr}")
    return [Term(expr)]


def numerator(factor: Expr) -> tuple[Expr, list[Expr]]:
    """`factor` as (constant, factors that read tensors or indices)."""
    constant, parts = ONE, []
    for part in sympy.Mul.make_args(factor):
        if part.atoms(sympy.Indexed) or part.has(Equal):
            parts.append(part)
        else:
            constant *= part
    return constant, parts
