"""Quantities of a concrete layer: a formula over abstract Jacobians, with a layer's own put in and its deltas solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
from sympy import Expr, Indexed, IndexedBase

from ..definitions.model import Layer, Quantity
from ..notation import ONE, Centred, Extent, Fresh, Index, IndexSum, index_atoms
from .derive import total_derivative, total_jacobian
from .kronecker import Kronecker, kronecker
from .terms import CalculusError, Term, contract, tidy

Axes = tuple[Index, ...]
Resolver = Callable[[Sequence[Axes]], list[Term]]


@dataclass(frozen=True)
class Formula:
    """`name[axes] = Σ terms`. A matrix is returned with the axes of each of its `groups` as one."""

    name: str
    axes: Axes
    terms: tuple[Term, ...]
    groups: tuple[Axes, ...] = ()
    blocks: bool = False  # whether the first group counts blocks: one block is no block

    @property
    def is_zero(self) -> bool:
        return not self.terms


class Instance:
    """One layer's Jacobians, with respect to its input or one parameter, ready to be put into quantities."""

    def __init__(self, layer: Layer, wrt: Indexed) -> None:
        self.layer, self.wrt, self.fresh = layer, wrt, Fresh()
        self.batch = layer.batch
        self.output_axes: Axes = layer.output.indices[1:]
        on_parameter = self.batch not in wrt.indices
        self.wrt_axes: Axes = tuple(wrt.indices) if on_parameter else tuple(wrt.indices[1:])
        wrt_group = ("p", "p2") if on_parameter else ("x", "x2")
        self.groups: dict[str, Axes] = {"y": self.output_axes, "y2": self.output_axes}
        self.groups |= dict.fromkeys(wrt_group, self.wrt_axes)
        self.resolvers: dict[str, Resolver] = {"J": self._jacobian, "H": self._second_derivative}
        self.structure: Kronecker | None = None
        if on_parameter:
            self.structure = self._kronecker()
        if self.structure is not None:
            found = self.structure
            groups = {"q": found.shared, "g": found.block, "o": found.outer, "i": found.inner}
            self.groups |= groups | {f"{name}2": axes for name, axes in groups.items() if name != "g"}
            self.resolvers |= {"s": self._cotangent, "a": self._input, "averaged": self._averaged}

    def _kronecker(self) -> Kronecker | None:
        """The structure, found with output indices that differ from the parameter's own."""
        at = self.fresh.all(self.output_axes)
        return kronecker(self._jacobian([(self.batch,), at, self.wrt_axes]), at, self.wrt_axes, self.batch)

    def _jacobian(self, groups: Sequence[Axes]) -> list[Term]:
        (n,), at, wrt = groups
        onto = wrt if self.batch not in self.wrt.indices else (n, *wrt)
        last, name = self.layer.statements[-1], str(self.wrt.base)
        # Reads of the layer's own names are renamed through fresh output indices, lest a primed copy captures them.
        return total_jacobian(last, name, (n, *at), onto, self.layer.statements, self.fresh)

    def _second_derivative(self, groups: Sequence[Axes]) -> list[Term]:
        (n,), at, first, second = groups
        return [
            derivative
            for term in self._jacobian([(n,), at, first])
            for derivative in total_derivative(
                term, str(self.wrt.base), (n, *second), self.layer.statements, self.fresh
            )
        ]

    def _cotangent(self, groups: Sequence[Axes]) -> list[Term]:
        (v,), (n,), shared, block, outer = groups
        assert self.structure is not None
        return [Term(IndexedBase("factor")[(v, n, *self.structure.arrange(shared, block, outer))])]

    def _averaged(self, groups: Sequence[Axes]) -> list[Term]:
        if len(groups) == 2:
            return [Term(IndexedBase("averaged")[tuple(i for group in groups for i in group)])]
        assert self.structure is not None
        rows, columns = (self.structure.arrange(*groups[k : k + 3]) for k in (0, 3))
        return [Term(IndexedBase("averaged")[(*rows, *columns)])]

    def _input(self, groups: Sequence[Axes]) -> list[Term]:
        (n,), block, shared, inner = groups
        assert self.structure is not None
        return [self.structure.input(n, block, shared, inner, self.batch).freshened(self.fresh)]

    def quantity(self, quantity: Quantity, name: str) -> Formula:
        """The quantity as a formula in this layer's own indices."""
        scope: dict[Index, Axes] = {}
        axes: list[Index] = []
        groups: list[Axes] = []
        for abstract in quantity.axes:
            concrete = self.groups.get(abstract.name, (abstract,))
            if set(concrete) & set(axes):
                concrete = tuple(Index(f"{i.name}2", i.many) for i in concrete)
            scope[abstract] = concrete
            axes += concrete
            if concrete or groups or abstract.name != "g":
                groups.append(concrete)
        found = [contract(term) for term in self.instantiate(quantity.value, scope)]
        if quantity.name == "residual":
            found = [_diagonal(term, scope, axes, name) for term in found]
            axes = axes[:]
        terms = tuple(tidy(_cancel(term), axes) for term in found if not term.is_zero)
        blocks = quantity.matrix and quantity.axes[0].name == "g" and bool(scope[quantity.axes[0]])
        return Formula(name, tuple(axes), terms, tuple(groups) if quantity.matrix else (), blocks)

    def instantiate(self, expr: Expr, scope: Mapping[Index, Axes]) -> list[Term]:
        """`expr` with index groups expanded as in `scope` and the abstract tensors resolved."""
        if isinstance(expr, IndexSum):
            new = {i: self.fresh.all(self.groups.get(i.name, (i,))) for i in expr.over}
            over = [i for group in new.values() for i in group]
            return [contract(term.summed(over)) for term in self.instantiate(expr.body, {**scope, **new})]
        if isinstance(expr, Indexed):
            groups = [scope[i] if i in scope else self.fresh.all(self.groups.get(i.name, (i,))) for i in expr.indices]
            resolve = self.resolvers.get(str(expr.base))
            if resolve is not None:
                return resolve(groups)
            return [Term(expr.base[tuple(i for group in groups for i in group)])]
        if isinstance(expr, sympy.Add):
            return [term for part in expr.args for term in self.instantiate(part, scope)]
        if isinstance(expr, sympy.Mul):
            product = [Term(ONE)]
            for part in expr.args:
                product = [left * right for left in product for right in self.instantiate(part, scope)]
            return [contract(term) for term in product]
        if isinstance(expr, sympy.Pow) and expr.exp == 2 and expr.has(Indexed):
            centred = isinstance(expr.base, Centred)
            base = self.instantiate(expr.base.body if centred else expr.base, scope)
            if centred:
                (over,) = scope[expr.base.over]
                base = [replace(term, centred=over) for term in base]
            if len(base) > 1:
                raise CalculusError(
                    f"{self.layer.source}: {self.layer.name}: the square of a Jacobian of several terms"
                )
            return [term.squared() for term in base]
        if expr.has(Indexed):
            raise CalculusError(f"no rule to put a layer into {expr}")
        return [Term(self._extents(expr))]

    def _extents(self, expr: Expr) -> Expr:
        """extent(q) of a group is the product of its axes' extents."""

        def product(group: Index) -> Expr:
            return sympy.Mul(*(Extent(i) for i in self.groups.get(group.name, (group,))))

        return expr.xreplace({e: product(e.args[0]) for e in expr.atoms(Extent)})


def _cancel(term: Term) -> Term:
    """Sums over an index that nothing depends on are its extent; it cancels with averages."""
    used = index_atoms(term.factor)
    if term.square is not None:
        used |= term.square.free
    idle = [i for i in term.sums if i not in used]
    factor = term.factor * sympy.Mul(*(Extent(i) for i in idle))
    # extents of bound copies of one axis are the same number
    originals = {e: Extent(Index(e.args[0].name.split("#")[0], e.args[0].many)) for e in factor.atoms(Extent)}
    return replace(term, factor=factor.xreplace(originals), sums=term.sums - set(idle))


def _diagonal(term: Term, scope: Mapping[Index, Axes], axes: Sequence[Index], name: str) -> Term:
    """A residual is kept where it is diagonal in the input: δ(x, x2) is dropped, x stays."""
    kept = []
    partners = 0
    for a, b in term.deltas:
        if a in axes and b not in axes:
            partners += 1
            term = term.rename({b: a})
        elif b in axes and a not in axes:
            partners += 1
            term = term.rename({a: b})
        else:
            kept.append((a, b))
    if partners != len(axes) - 1:
        raise CalculusError(f"{name}: a second derivative that is not diagonal in the input has no program yet")
    return contract(replace(term, deltas=tuple(kept)))
