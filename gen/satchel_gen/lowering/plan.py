"""From a term to a tree of tensor operations: sums, contractions and elementwise maps, with their FLOPs and bytes.

The order is fixed here, at generation: an index that only one operand reads is summed first (a factor's columns, say), then
pairs of operands are contracted whose shared index no other operand reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import sympy
from sympy import Expr, Indexed

from ..calculus.terms import CalculusError, Term
from ..notation import ONE, Access, Equal, Extent, Index, base_name, index_atoms, reads

Axes = tuple[Index, ...]


def extent_symbol(index: Index) -> sympy.Symbol:
    """The extent of an index; copies of one axis (`o`, `o2`) share it."""
    return sympy.Symbol(base_name(index).upper(), positive=True, integer=True)


def size(axes: Iterable[Index]) -> Expr:
    return sympy.Mul(*(extent_symbol(i) for i in axes))


@dataclass(frozen=True)
class Leaf:
    """A tensor argument with its `stored` axes; those that `axes` lacks have extent 1 and are squeezed.

    Where axes are read at affine positions, `windows` holds an access for each of them, all last in `stored`; in `axes` stand
    first the places, then the taps. An axis stored twice is read along its diagonal, which is then the last axis.
    """

    name: str
    axes: Axes
    stored: Axes
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True)
class Window:
    """An axis read at (step · place + reach · tap + offset) / divisor."""

    axis: Index
    place: Index
    tap: Index
    step: Expr
    reach: Expr
    offset: Expr
    divisor: Expr


@dataclass(frozen=True)
class Map:
    """An elementwise expression of its children, which stand for the reads of the same position."""

    expr: Expr
    reads: tuple[Indexed, ...]
    children: tuple[Node, ...]
    axes: Axes


@dataclass(frozen=True)
class Reduce:
    """Σ over axes of one child."""

    child: Node
    over: Axes
    axes: Axes


@dataclass(frozen=True)
class Contract:
    """Σ over shared axes of a product of two operands."""

    left: Node
    right: Node
    over: Axes
    axes: Axes


@dataclass(frozen=True)
class Products:
    """Σ over pairs of operands of their products over one axis, as one product of all that are stacked along it. A pair that lacks
    the axis is one row."""

    pairs: tuple[tuple[Node, Node], ...]
    over: Index
    axes: Axes


@dataclass(frozen=True)
class Permute:
    """The same elements with axes in another order."""

    child: Node
    axes: Axes


@dataclass(frozen=True)
class Add:
    """A sum of parts, each broadcast over the axes that it lacks."""

    parts: tuple[Node, ...]
    axes: Axes


@dataclass(frozen=True)
class Scaled:
    """A scalar coefficient, of extents and numbers, times a child."""

    child: Node
    coefficient: Expr

    @property
    def axes(self) -> Axes:
        return self.child.axes


def is_transposed(windows: Sequence[Window]) -> bool:
    """Whether the windows are those of the transposed access."""
    return any(w.divisor != 1 for w in windows) or all(w.reach.could_extract_minus_sign() for w in windows)


def is_place_gram(node: Contract) -> bool:
    """Whether windows of a tensor meet themselves at other places, summed over the taps: then its elements' products are shared."""
    one, other = node.left, node.right
    if not (isinstance(one, Leaf) and isinstance(other, Leaf)) or not one.windows or one.name != other.name:
        return False
    taps, places = ([getattr(w, kind) for w in one.windows] for kind in ("tap", "place"))
    apart = [w.place for w in other.windows]
    own = tuple(i for i in one.axes if i not in (*places, *taps) and i not in node.over)
    met = set(places).isdisjoint(apart) and set(taps) <= set(node.over) and taps == [w.tap for w in other.windows]
    return met and not is_transposed(one.windows) and node.axes == (*own, *places, *apart)


Node = Leaf | Map | Reduce | Contract | Products | Permute | Scaled | Add


def children(node: Node) -> tuple[Node, ...]:
    match node:
        case Leaf():
            return ()
        case Map(children=parts) | Add(parts=parts):
            return parts
        case Contract(left=left, right=right):
            return (left, right)
        case Products(pairs=pairs):
            return tuple(itertools.chain.from_iterable(pairs))
        case Reduce(child=child) | Scaled(child=child) | Permute(child=child):
            return (child,)


def flops(node: Node) -> Expr:
    """Floating-point operations: 2 per multiply-add, one per element of a map or sum."""
    match node:
        case Contract(left=Leaf(stored=stored, windows=windows)) if is_place_gram(node):
            pairs, lead = (
                size(w.axis for w in windows) ** 2,
                size(i for i in stored if i not in [w.axis for w in windows]),
            )
            own = 2 * lead * pairs + size(w.tap for w in windows) * size(node.axes)
        case Contract(left=left, right=right):
            own = 2 * size(dict.fromkeys((*left.axes, *right.axes)))
        case Products(pairs=pairs):
            own = sum((2 * size(dict.fromkeys((*left.axes, *right.axes))) for left, right in pairs), sympy.Integer(0))
        case Map():
            own = size(node.axes)
        case Add(parts=parts):
            own = (len(parts) - 1) * size(node.axes)
        case Reduce(child=child):
            own = size(child.axes)
        case _:
            own = sympy.Integer(0)
    return own + sum((flops(child) for child in children(node)), sympy.Integer(0))


def elements_moved(node: Node) -> Expr:
    """Elements read and written, each operation reading its operands and writing its result."""
    own = sympy.Integer(0)
    if isinstance(node, Contract) and is_place_gram(node):
        assert isinstance(node.left, Leaf)
        axes, taps = ([getattr(w, kind) for w in node.left.windows] for kind in ("axis", "tap"))
        lead = [i for i in node.left.stored if i not in axes and i not in node.over]
        own = size(node.left.stored) + 2 * size(lead) * size(axes) ** 2 + 2 * size(taps) * size(node.axes)
    elif not isinstance(node, Leaf | Permute | Scaled):
        own = size(node.axes) + sum((size(child.axes) for child in children(node)), sympy.Integer(0))
    return own + sum((elements_moved(child) for child in children(node)), sympy.Integer(0))


def calls(node: Node) -> int:
    own = 0 if isinstance(node, Leaf | Permute | Scaled) else 1
    return own + sum(calls(child) for child in children(node))


def leaves(node: Node) -> list[Leaf]:
    """Every leaf, each tensor once, in order of appearance."""
    if isinstance(node, Leaf):
        return [node]
    found = {leaf.name: leaf for child in children(node) for leaf in leaves(child)}
    return list(found.values())


def indices_of(node: Node) -> set[Index]:
    """Every index that a tree walks over."""
    return set(node.axes).union(*map(indices_of, children(node)))


def leaf(read: Indexed, dropped: frozenset[str] = frozenset()) -> Leaf:
    stored = tuple(i.args[0] if isinstance(i, Access) else i for i in read.indices)
    windows = tuple(_window(i) for i in read.indices if isinstance(i, Access))
    plain = [i for i in read.indices if not isinstance(i, Access) and i.name not in dropped]
    twice = [i for i in dict.fromkeys(plain) if plain.count(i) == 2]
    axes = (*(i for i in plain if i not in twice), *(w.place for w in windows), *(w.tap for w in windows), *twice)
    return Leaf(str(read.base), axes, stored, windows)


def _window(access: Access) -> Window:
    axis, position, place = access.args
    numerator, divisor = sympy.together(position).as_numer_denom()
    numerator = sympy.expand(numerator)
    others = index_atoms(numerator) - {place}
    if len(others) != 1:
        raise CalculusError(f"the position {position} of axis {axis} is not affine in {place} and one more index")
    (tap,) = others
    step, reach = numerator.coeff(place), numerator.coeff(tap)
    return Window(axis, place, tap, step, reach, sympy.expand(numerator - step * place - reach * tap), divisor)


def plan_sum(parts: Sequence[Term], axes: Axes) -> Node:
    """The tree for a sum of terms, each over its own axes."""
    if len(parts) == 1:
        (term,) = parts
        own = tuple(i for i in axes if i in term.free)
        return plan(term, axes if own == axes or not term.sums else own)
    trees = []
    for term in parts:
        own = tuple(i for i in axes if i in term.free)
        trees.append(plan(term, own))
    return Add(tuple(trees), axes)


def plan(term: Term, axes: Axes, dropped: frozenset[str] = frozenset()) -> Node:
    """The tree for one term without a squared sum; `dropped` names indices of extent 1 to squeeze away."""
    if term.square is not None:
        raise CalculusError("a squared sum is planned by lowering.squares")
    coefficient, operands = _operands(term, dropped)
    sums = set(term.sums)
    if not sums:
        return _map_all(term, axes, dropped)
    while True:
        operands = [_sum_own(operand, operands, sums) for operand in operands]
        if len(operands) == 1:
            break
        left, right = _next_pair(operands, sums)
        rest = [o for o in operands if o is not left and o is not right]
        elsewhere = {i for o in rest for i in o.axes}
        over = tuple(i for i in left.axes if i in right.axes and i in sums and i not in elsewhere)
        out = axes if not rest else _natural_axes(left, right, over)
        sums -= set(over)
        product: Node = _product(left, right, over, out)
        operands = [*rest, product]
    (node,) = operands
    if node.axes != axes:
        node = Permute(node, axes)
    return node if coefficient == 1 else _scaled(node, coefficient)


def _scaled(node: Node, coefficient: Expr) -> Node:
    """A coefficient meets an operand of a product that is smaller, or a product of matrices, which may be divided as it is computed."""
    if not isinstance(node, Map) or node.expr != sympy.Mul(*node.reads):
        return Scaled(node, coefficient)
    children = list(node.children)
    place = min(range(len(children)), key=lambda k: (len(children[k].axes), not isinstance(children[k], Contract)))
    small = children[place]
    if len(small.axes) == len(node.axes) and not isinstance(small, Contract):
        return Scaled(node, coefficient)
    children[place] = Scaled(small, coefficient)
    return replace(node, children=tuple(children))


def _operands(term: Term, dropped: frozenset[str]) -> tuple[Expr, list[Node]]:
    """The factor's parts, grouped by the indices they read."""
    coefficient, groups = ONE, dict[frozenset[Index], list[Expr]]()
    for part in sympy.Mul.make_args(term.factor):
        read_by = frozenset(i for i in index_atoms(part) if i.name not in dropped)
        if not index_atoms(part):
            coefficient *= part
        else:
            groups.setdefault(read_by, []).append(part)
    operands: list[Node] = []
    for parts in groups.values():
        expr = sympy.Mul(*parts)
        operands.append(leaf(expr, dropped) if isinstance(expr, Indexed) else _map(expr, dropped))
    return coefficient, operands


def _map(expr: Expr, dropped: frozenset[str], axes: Axes | None = None) -> Map:
    accessed = tuple(reads(expr))
    parts: list[Node] = [leaf(read, dropped) for read in accessed]
    order = dict.fromkeys(i for part in sorted(parts, key=lambda p: -len(p.axes)) for i in part.axes)
    unread = (i for i in index_atoms(expr) if i.name not in dropped)  # of a mask
    order |= dict.fromkeys(sorted(unread, key=str))
    return _scaled_small(Map(expr, accessed, tuple(parts), axes if axes is not None else tuple(order)))


def _scaled_small(node: Map) -> Map:
    """A coefficient of extents meets the smallest operand of its product, not the product."""
    children = dict(zip(node.reads, node.children, strict=True))
    summands = []
    for product in sympy.Add.make_args(node.expr):
        parts = sympy.Mul.make_args(product)
        coefficient = sympy.Mul(*(part for part in parts if not index_atoms(part)))
        small = min(
            (p for p in parts if p in children),
            key=lambda p: (len(children[p].axes), node.axes[-1] in children[p].axes),
            default=None,
        )
        if small is not None and coefficient.atoms(Extent) and len(children[small].axes) < len(node.axes):
            slot = sympy.IndexedBase(f"scaled_{small.base}")[children[small].axes]
            children[slot] = Scaled(children[small], coefficient)
            product = product / coefficient / small * slot
        summands.append(product)
    expr = sympy.Add(*summands)
    read = {r: child for r, child in children.items() if expr.has(r)}
    return Map(expr, tuple(read), tuple(read.values()), node.axes)


def _map_all(term: Term, axes: Axes, dropped: frozenset[str]) -> Node:
    """A term without sums. What reads fewer axes is computed on its own: a slope once, not once per column."""
    deltas = sympy.Mul(*(Equal(a, b) for a, b in term.deltas))
    coefficient, operands = _operands(term, dropped)
    if len(operands) == 1 and not term.deltas and operands[0].axes == axes:
        return operands[0] if coefficient == 1 else Scaled(operands[0], coefficient)
    slots = tuple(sympy.IndexedBase(f"operand{k}")[part.axes] for k, part in enumerate(operands))
    return _scaled_small(Map(coefficient * sympy.Mul(*slots) * deltas, slots, tuple(operands), axes))


def _sum_own(operand: Node, operands: Sequence[Node], sums: set[Index]) -> Node:
    """Sum what only this operand reads."""
    elsewhere = {i for other in operands if other is not operand for i in other.axes}
    over = tuple(i for i in operand.axes if i in sums and i not in elsewhere)
    if not over:
        return operand
    sums -= set(over)
    return Reduce(operand, over, tuple(i for i in operand.axes if i not in over))


def _next_pair(operands: Sequence[Node], sums: set[Index]) -> tuple[Node, Node]:
    """The pair that removes an index nobody else reads and leaves the smallest product."""

    def rank(pair: tuple[Node, Node]) -> tuple[bool, int, int, int]:
        left, right = pair
        elsewhere = {i for o in operands if o is not left and o is not right for i in o.axes}
        removed = [i for i in left.axes if i in right.axes and i in sums and i not in elsewhere]
        kept = {*left.axes, *right.axes} - set(removed)
        larger = max(pair, key=lambda operand: len(operand.axes))
        products = sum(isinstance(operand, Contract) for operand in pair)
        return (not removed, len(kept), products, -max((larger.axes.index(i) for i in removed), default=0))

    return min(itertools.combinations(operands, 2), key=rank)


def _natural_axes(left: Node, right: Node, over: Axes) -> Axes:
    batch = [i for i in left.axes if i in right.axes and i not in over]
    only = [i for i in (*left.axes, *right.axes) if i not in batch and i not in over]
    return (*batch, *only)


def _product(left: Node, right: Node, over: Axes, axes: Axes) -> Node:
    if over:
        return Contract(left, right, over, axes)
    slots = tuple(sympy.IndexedBase(f"operand{k}")[part.axes] for k, part in enumerate((left, right)))
    return Map(slots[0] * slots[1], slots, (left, right), axes)
