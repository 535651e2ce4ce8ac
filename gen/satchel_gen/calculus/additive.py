"""What adds over the uses of a parameter, and every other quantity as a reduction of that.

Several uses of a parameter are one with more outputs: y and q run over the outputs and positions of all of them. A quantity whose
outermost sum runs over these is additive. Any other holds such sums further inside, and is computed from their totals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sympy import Expr, IndexedBase

from ..definitions.model import Quantity
from ..definitions.quantities import i, i2, o, o2, p, p2, q, y
from ..notation import Extent, IndexSum
from .terms import CalculusError

#: The indices that several uses have more of.
JOINED = {y, q}
#: The second axis of a matrix.
SECOND = {p: p2, o: o2, i: i2}


@dataclass(frozen=True)
class Reduction:
    """`quantity`, as a formula in the tensor of what is additive."""

    quantity: Quantity
    of: Quantity
    value: Expr


def is_additive(quantity: Quantity) -> bool:
    """Whether the quantity of several uses is the sum of theirs."""
    coefficient, total = _parts(quantity)
    extents = {extent.args[0] for extent in coefficient.atoms(Extent)}
    return isinstance(total, IndexSum) and not JOINED.isdisjoint(total.over) and JOINED.isdisjoint(extents)


def reduction(quantity: Quantity, additive: Sequence[Quantity]) -> Reduction:
    """The quantity from the only additive one that it needs."""
    for of in additive:
        coefficient, total = _parts(of)
        stored = IndexedBase(of.name)[of.axes] / coefficient
        value = quantity.value.xreplace({total: stored, total.xreplace(SECOND): stored.xreplace(SECOND)})
        if not any(JOINED & set(part.over) for part in value.atoms(IndexSum)):
            return Reduction(quantity, of, value)
    raise CalculusError(f"{quantity.name} is no reduction of {', '.join(of.name for of in additive)}")


def _parts(quantity: Quantity) -> tuple[Expr, Expr]:
    """The quantity as (coefficient, what depends on tensors)."""
    coefficient, total = quantity.value.as_independent(IndexSum)
    return coefficient, total
