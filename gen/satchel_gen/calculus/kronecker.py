"""Kronecker structure, found in a parameter's Jacobian.

If ∂y[n, q, o′] / ∂θ[o, i] = δ(o, o′) · a[n, q, i], then θ's block of the curvature Σ Jᵀ H J is approximated by B ⊗ A with A
from `a` and B from the output's factor (Martens & Grosse, 2015). A delta index that the rest of the term does not read is a
Kronecker factor; one that it reads makes the block diagonal, which has no such structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..notation import Index, index_atoms
from .terms import Term

Axes = tuple[Index, ...]


@dataclass(frozen=True)
class Kronecker:
    """`shared` output axes q, Kronecker axes `outer` o (of the parameter), the rest `inner` i, and a[n, q, i]."""

    shared: Axes
    outer: Axes
    inner: Axes
    meets: Axes  # the output axis behind each outer axis
    term: Term

    def arrange(self, output_axes: Axes, shared: Axes, outer: Axes) -> Axes:
        """Indices for the output's axes in their own order."""
        where = dict(zip((*self.shared, *self.meets), (*shared, *outer), strict=True))
        return tuple(where[axis] for axis in output_axes)

    def input(self, n: Index, shared: Axes, inner: Axes, batch: Index) -> Term:
        """a[n, shared, inner]."""
        names = dict(zip((batch, *self.shared, *self.inner), (n, *shared, *inner), strict=True))
        return Term(self.term.factor, self.term.sums).rename(names)


def kronecker(jacobian: Sequence[Term], output_axes: Axes, parameter_axes: Axes, batch: Index) -> Kronecker | None:
    """The structure of a parameter's Jacobian, or None where it has none."""
    if len(jacobian) != 1:
        return None
    (term,) = jacobian
    pairs: dict[Index, Index] = {}
    for a, b in term.deltas:
        output, parameter = (a, b) if a in output_axes else (b, a)
        if output not in output_axes or parameter not in parameter_axes:
            return None
        pairs[parameter] = output
    read = index_atoms(term.factor) - term.sums
    if read & (set(pairs) | set(pairs.values())):
        return None
    outer = tuple(axis for axis in parameter_axes if axis in pairs)
    inner = tuple(axis for axis in parameter_axes if axis not in pairs)
    meets = tuple(pairs[axis] for axis in outer)
    shared = tuple(axis for axis in output_axes if axis not in meets)
    if not outer or not read <= {batch, *shared, *inner}:
        return None
    return Kronecker(shared, outer, inner, meets, Term(term.factor, term.sums))
