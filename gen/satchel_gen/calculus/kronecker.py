"""Kronecker structure, found in a parameter's Jacobian.

If ∂y[n, q, g′, o′] / ∂θ[g, o, i] = δ(g, g′) δ(o, o′) · a[n, g, q, i], then θ's block of the curvature Σ Jᵀ H J is approximated by
⊕_g B_g ⊗ A_g with A from `a` and B from the output's factor (Martens & Grosse, 2015). A delta index that the rest of the term
does not read is a Kronecker factor o; one that it reads makes the curvature block-diagonal over g (a grouped convolution).
Where nothing but block axes is left (a norm's scale: δ(j, j′) x̂[n, j]) there is no Kronecker structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..notation import Index, index_atoms
from .terms import Term

Axes = tuple[Index, ...]


@dataclass(frozen=True)
class Kronecker:
    """`shared` output axes q; the parameter's block axes g, Kronecker axes `outer` o and the rest `inner` i; and a[n, g, q, i]."""

    output: Axes
    shared: Axes
    block: Axes
    outer: Axes
    inner: Axes
    meets: Axes  # the output axis behind each block and outer axis
    term: Term

    def arrange(self, shared: Axes, block: Axes, outer: Axes) -> Axes:
        """Indices for the output's axes in their own order."""
        where = dict(zip((*self.shared, *self.meets), (*shared, *block, *outer), strict=True))
        return tuple(where[axis] for axis in self.output)

    def input(self, n: Index, block: Axes, shared: Axes, inner: Axes, batch: Index) -> Term:
        """a[n, block, shared, inner]."""
        own = (batch, *self.block, *self.shared, *self.inner)
        return Term(self.term.factor, self.term.sums).rename(dict(zip(own, (n, *block, *shared, *inner), strict=True)))


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
    # Where δ(g, g′) holds, either name stands for the same value: the parameter's.
    term = Term(term.factor, term.sums).rename({output: parameter for parameter, output in pairs.items()})
    read = index_atoms(term.factor) - term.sums
    block = tuple(axis for axis in parameter_axes if axis in pairs and axis in read)
    outer = tuple(axis for axis in parameter_axes if axis in pairs and axis not in read)
    inner = tuple(axis for axis in parameter_axes if axis not in pairs)
    meets = tuple(pairs[axis] for axis in (*block, *outer))
    shared = tuple(axis for axis in output_axes if axis not in meets)
    if not (outer or (block and inner)) or not read <= {batch, *shared, *block, *inner}:
        return None
    return Kronecker(output_axes, shared, block, outer, inner, meets, term)
