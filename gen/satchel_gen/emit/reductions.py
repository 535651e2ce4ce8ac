"""Context of reductions.py.jinja: quantities of several uses of a parameter, from what is additive over them."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ..calculus.additive import Reduction, is_additive, reduction
from ..calculus.derive import Statement
from ..calculus.instantiate import Formula
from ..calculus.terms import Term
from ..definitions.model import Quantity
from ..definitions.quantities import BLOCK, INPUT_FACTORS, OUTPUT_FACTORS, PULLBACKS, g, n, p, q
from ..lowering.deviations import deviation_variants
from ..lowering.plan import Axes, extent_symbol, plan
from ..lowering.squares import Variant
from ..notation import ONE, Centred, Extent, IndexSum
from .aten import Body, unpack_extents
from .functions import Function, result

FACTORS = (*OUTPUT_FACTORS, *INPUT_FACTORS)


@dataclass(frozen=True)
class ReductionContext:
    function: Function
    of: str
    over: str
    signed: bool
    positions: bool
    second: str | None


def reduction_contexts() -> list[ReductionContext]:
    """Every quantity that is not additive."""
    quantities = (*PULLBACKS, BLOCK, *FACTORS)
    additive = [quantity for quantity in quantities if is_additive(quantity)]
    return [_context(reduction(quantity, additive)) for quantity in quantities if quantity not in additive]


def _context(found: Reduction) -> ReductionContext:
    quantity, stored = found.quantity, found.of.name
    variant = _variant(found)
    read = {str(r.base) for r in found.value.atoms(sympy.Indexed)}
    arguments: dict[str, Axes] = {stored: found.of.axes} | ({"sign": found.of.axes[:2]} if "sign" in read else {})
    flat = p in found.of.axes
    body = Body(arguments, renamed={stored: f"{stored}.flatten(2)"} if flat else {})
    text = result(body, variant)
    if p in quantity.axes and not quantity.matrix:
        text = f"({text}).reshape({stored}.shape[{2 - quantity.axes.index(p)} :])"
    if g in quantity.axes and g in found.of.axes[1:]:  # one block is no block
        text = f"({text}).squeeze(0)"
    counts = {str(extent_symbol(q)): "int"} if found.value.has(Extent(q)) else {}
    known = {symbol for symbol in body.extents if str(symbol) not in counts}
    lines = (*unpack_extents(known, arguments), *body.lines)
    formula = str(Statement(sympy.IndexedBase(quantity.name)[quantity.axes], found.value))
    function = Function(quantity.name, formula, "", tuple(arguments), lines, text, entry=False, numbers=counts)
    over = "columns" if n in quantity.axes else "deviations" if found.value.has(Centred) else "samples"
    return ReductionContext(function, stored, over, "sign" in read, bool(counts), _second_moment(quantity))


def _second_moment(quantity: Quantity) -> str | None:
    """Of squared deviations from a mean, the quantity that does not take it off."""
    plain = quantity.value.xreplace({centred: centred.body for centred in quantity.value.atoms(Centred)})
    return next((q.name for q in PULLBACKS if q.value == plain), None) if plain != quantity.value else None


def _variant(found: Reduction) -> Variant:
    coefficient, total = found.value.as_independent(IndexSum)
    if not isinstance(total, IndexSum):
        return Variant("", plan(Term(found.value), found.quantity.axes))
    body, sums = total.body, frozenset(total.over)
    if isinstance(body, sympy.Pow) and isinstance(body.base, Centred):
        term = Term(ONE, sums, (), Term(body.base.body, centred=body.base.over))
        (variant,) = deviation_variants(Formula(found.quantity.name, found.quantity.axes, (term,)))
        return variant
    return Variant("", plan(Term(coefficient * body, sums), found.quantity.axes))
