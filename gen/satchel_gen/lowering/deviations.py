"""Squared deviations: Σ_{v,n} (T_n − mean_n T)², without the difference of two moments, which cancels where the samples agree.

- *blockwise*: the product T in blocks of samples that stay in cache, whose deviations are merged.
- *centred*: where T = a b is a product without a sum. With the means ā, b̄ over n, d = a − ā and e = b − b̄,
  T − ā b̄ = a e + b̄ d, so that Σ_n (T − mean T)² = Σ a² e² + Σ (a d) (2 b̄ e) + (Σ d²) b̄² − (Σ a e / √N)²: the first three as one
  product. What scales them is in their operands, which are smaller than the result.
"""

from __future__ import annotations

from sympy import IndexedBase, Max, sqrt

from ..calculus.instantiate import Formula
from ..calculus.terms import Term
from ..notation import Access, Extent, Index, index_atoms, reads
from .plan import Axes, Leaf, Map, Node, Products, Reduce, Scaled, leaf, plan
from .squares import Variant, inner_axes, no_larger_than_an_operand, square_of


def deviation_variants(formula: Formula, own: Axes = ()) -> tuple[Variant, ...]:
    """The programs of Σ (inner − mean_n)²."""
    (term,) = formula.terms
    inner = term.square
    assert inner is not None and inner.centred is not None and term.factor == 1
    n, product = inner.centred, Term(inner.factor, inner.sums)
    stored = plan(product, inner_axes(term, formula.axes, own))
    if no_larger_than_an_operand(stored, inner):
        mean = _mean_over(n, plan(product.summed([n]), tuple(i for i in stored.axes if i != n)))
        tree = _sum_of_squares(stored, Leaf("mean", mean.axes, mean.axes), formula.axes)
        return (Variant("", tree, named=(("mean", mean),)),)
    # What blocks of it cost: the deviations themselves are merged at run time.
    blockwise = Variant("blockwise", square_of(term, stored, formula.axes), inner=stored)
    centred = _centred(product, n, formula.axes)
    return (centred, blockwise) if centred is not None else (blockwise,)


def _mean_over(n: Index, total: Node) -> Node:
    return Scaled(total, 1 / Extent(n))


def _sum_of_squares(product: Node, mean: Node, axes: Axes) -> Node:
    slots = (IndexedBase("product")[product.axes], IndexedBase("mean")[mean.axes])
    squared = Map((slots[0] - slots[1]) ** 2, slots, (product, mean), product.axes)
    return Reduce(squared, tuple(i for i in product.axes if i not in axes), axes)


def _centred(product: Term, n: Index, axes: Axes) -> Variant | None:
    """Where the columns and the inner sum have extent 1, and both operands differ by sample."""
    a = next(read for read in reads(product.factor) if str(read.base) == "factor")
    b = product.factor / a
    unit = tuple(sorted((*product.sums, *(i for i in a.indices if i.name == "v")), key=str))
    dropped = frozenset(i.name for i in unit)
    first, second = ([i for i in axes if i in index_atoms(part)] for part in (a, b))
    if n not in index_atoms(b) or not reads(b) or product.factor.has(Access):
        return None
    # The letters of the formula above: the two operands, the mean of b, and the deviations of both.
    left, right = IndexedBase("a")[(n, *first)], IndexedBase("b")[(n, *second)]
    centre = IndexedBase("centre")[tuple(second)]
    d, e = IndexedBase("d")[(n, *first)], IndexedBase("e")[(n, *second)]
    share = IndexedBase("share")[(n, *first)]
    over = frozenset({n})
    pairs = (
        (plan(Term(left**2), (n, *first)), plan(Term(e**2), (n, *second))),
        (plan(Term(left * d), (n, *first)), plan(Term(2 * centre * e), (n, *second))),
        (plan(Term(d**2, over), tuple(first)), plan(Term(centre**2), tuple(second))),
    )
    named = {
        "a": plan(Term(a), (n, *first), dropped),
        "b": plan(Term(b), (n, *second), dropped),
        "centre": _mean_over(n, Reduce(leaf(right), (n,), tuple(second))),
        "d": _minus(leaf(left), _mean_over(n, Reduce(leaf(left), (n,), tuple(first)))),
        "e": _minus(leaf(right), leaf(centre)),
        "share": plan(Term(left / sqrt(Extent(n))), (n, *first)),
        "total": Products(pairs, n, axes),
        "drift": plan(Term(share * e, over), axes),
    }
    slots = tuple(IndexedBase(name)[axes] for name in ("total", "drift"))
    total, drift = slots
    # Where the deviations cancel to nothing, rounding leaves either sign.
    expr = Max(0, total - drift**2)
    return Variant("centred", Map(expr, slots, (leaf(total), leaf(drift)), axes), unit, named=tuple(named.items()))


def _minus(node: Node, mean: Node) -> Node:
    slots = (IndexedBase("value")[node.axes], IndexedBase("mean")[mean.axes])
    return Map(slots[0] - slots[1], slots, (node, mean), node.axes)
