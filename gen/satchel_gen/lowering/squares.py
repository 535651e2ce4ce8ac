"""Squared sums: Σ_outer w (Σ_r a b)². The ways to compute one, to be chosen by cost at run time.

- *separated*: where the inner sum has one summand, (a b)² = a² b², and everything contracts early.
- *blockwise*: the inner product in blocks of samples that stay in cache, squared and summed; it is never stored whole.
- *gram*: where everything else is summed outside, Σ_{r,r'} (Σ a a') (Σ b b').
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy import Expr

from ..calculus.instantiate import Formula
from ..calculus.terms import Term
from ..notation import Access, Index, index_atoms, plain_names, reads
from .plan import Axes, Leaf, Map, Node, Reduce, calls, elements_moved, flops, leaf, leaves, plan, plan_sum, size


@dataclass(frozen=True)
class Variant:
    """One program for a rule. `unit` are axes that must have extent 1, `several` those that must not all have it; `inner` is the product
    before it is squared.

    `named` intermediates are computed first, in order; the tree, and those that follow, read them by name.
    """

    name: str
    tree: Node
    unit: Axes = ()
    several: Axes = ()
    inner: Node | None = None
    named: tuple[tuple[str, Node], ...] = ()

    @property
    def trees(self) -> tuple[Node, ...]:
        return (*(node for _, node in self.named), self.tree)

    @property
    def arguments(self) -> list[Leaf]:
        """What the program reads of its arguments, each tensor once."""
        known = {name for name, _ in self.named}
        found = {leaf.name: leaf for tree in self.trees for leaf in leaves(tree) if leaf.name not in known}
        return list(found.values())

    @property
    def flops(self) -> Expr:
        return sum(map(flops, self.trees), sympy.Integer(0))

    @property
    def elements(self) -> Expr:
        """Elements of the operands and the result."""
        return sum((size(tensor.stored) for tensor in self.arguments), size(self.tree.axes))

    @property
    def calls(self) -> int:
        return calls(self.tree)

    @property
    def calls_before(self) -> int:
        """Operations that the named intermediates take."""
        return sum(calls(node) for _, node in self.named)

    @property
    def scratch(self) -> Expr:
        """Elements moved through intermediates."""
        return sum(map(elements_moved, self.trees), sympy.Integer(0)) - self.elements

    @property
    def blockwise(self) -> bool:
        return self.name == "blockwise"


def variants(formula: Formula, own: Axes = ()) -> tuple[Variant, ...]:
    """The programs of a formula: one, unless it is a squared sum of a product. own: axes of the parameter that it belongs to."""
    if len(formula.terms) > 1:
        return (Variant("", plan_sum(formula.terms, formula.axes)),)
    (term,) = formula.terms
    if term.square is None:
        return (Variant("", plan(term, formula.axes)),)
    inner = term.square
    stored = plan(inner, inner_axes(term, formula.axes, own))
    per_sample = square_of(term, stored, formula.axes)
    if no_larger_than_an_operand(stored, inner):
        return (Variant("", per_sample),)
    dropped = frozenset(i.name for i in inner.sums)
    apart = Term(term.factor * inner.factor**2, term.sums)
    unit = tuple(sorted(inner.sums, key=str))
    found = [] if inner.factor.has(Access) else [Variant("separated", plan(apart, formula.axes, dropped), unit)]
    found.append(Variant("blockwise", per_sample, inner=stored))
    gram = _gram(term)
    if gram is not None:  # of one summand it is made of dot products, which the separated program takes all at once
        several = unit if found[0].name == "separated" else ()
        found.append(Variant("gram", plan(gram, formula.axes), several=several))
    return tuple(found)


def no_larger_than_an_operand(product: Node, inner: Term) -> bool:
    """Whether storing a product costs nothing that its operands do not: there is no choice to make."""
    return len(reads(inner.factor)) < 2 or any(set(product.axes) <= set(read.indices) for read in reads(inner.factor))


def inner_axes(term: Term, axes: Axes, own: Axes) -> Axes:
    """Axes of the inner product: columns and samples first, the parameter's own last, as these are ordered."""
    assert term.square is not None
    free = term.square.free
    leading = [i for name in ("v", "n") for i in free if i.name == name]
    order = [i for read in reads(term.square.factor) for i in leaf(read).axes]
    order += sorted(free, key=str)  # of masks
    rest = [i for i in (*axes, *own, *order) if i in free and i not in leading]
    return (*leading, *dict.fromkeys(rest))


def square_of(term: Term, stored: Node, axes: Axes) -> Node:
    """Σ_outer w · stored²."""
    slot = sympy.IndexedBase("product")[stored.axes]
    squared: Node = Map(slot**2, (slot,), (stored,), stored.axes)
    if term.factor != 1:
        own, whole = index_atoms(term.factor), stored.axes
        if any(i in own and i not in whole for i in axes):  # the weight has axes that the product lacks
            whole = (*(i for i in whole if i not in axes), *(i for i in axes if i in own or i in whole))
        weight = plan(Term(term.factor), tuple(i for i in whole if i in own))
        slots = (sympy.IndexedBase("weight")[weight.axes], slot)
        squared = Map(slots[0] * slots[1] ** 2, slots, (weight, stored), whole)
    over = tuple(i for i in squared.axes if i in term.sums)
    return Reduce(squared, over, axes) if over else squared


def _gram(term: Term) -> Term | None:
    """Σ_{r,r'} of products, where every other index of the inner product is summed outside or belongs to both operands."""
    assert term.square is not None
    inner = term.square
    parts = [part for part in sympy.Mul.make_args(inner.factor) if index_atoms(part)]
    shared = set.intersection(*(index_atoms(part) for part in parts))
    own = [index_atoms(part) - shared - inner.sums for part in parts]
    if not all(own) or not set().union(*own) <= term.sums:
        return None
    twins = {i: Index(f"{i.name}#1", i.many) for i in inner.sums}
    names = plain_names([*inner.free, *inner.sums, *term.sums], twins.values())
    twin = inner.rename({i: names[twins[i]] for i in inner.sums})
    return Term(term.factor * inner.factor * twin.factor, term.sums | inner.sums | twin.sums)
