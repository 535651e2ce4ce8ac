"""Index notation: the language in which layers, losses and features are written.

    n, r, o, i = indices("n r* o i")
    x, y, W, b = tensors("input output weight bias")
    Statement(y[n, r, o], Sum(W[o, i] * x[n, r, i], i) + b[o])

SymPy supplies algebra and `diff`; sums are our own. SymPy's `Sum(e, (c, a, b))` silently means "c from a to b", its
`doit` solves affine deltas without a divisibility test, and its bound indices are captured by `subs`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import sympy
from sympy import Expr, Function, Indexed, IndexedBase, Integer, Symbol, Tuple
from sympy.core.function import ArgumentIndexError


class Index(Symbol):
    """An index. One marked `many` stands for any number of axes, zero included, flattened to one."""

    __slots__ = ("many",)
    many: bool

    def __new__(cls, name: str, many: bool = False) -> Index:
        index = Symbol.__xnew__(cls, name, integer=True, nonnegative=True)
        index.many = many
        return index

    def _hashable_content(self) -> tuple[Any, ...]:
        return (*super()._hashable_content(), self.many)


class Option(Symbol):
    """A number that the module was built with: its attribute, or component `part` of it, as in stride[0]."""

    __slots__ = ("attribute", "part")
    attribute: str
    part: int | None

    def __new__(cls, attribute: str, part: int | None = None, integer: bool = False) -> Option:
        name = attribute if part is None else f"{attribute}[{part}]"
        option = Symbol.__xnew__(cls, name, integer=integer or None, real=True)
        option.attribute, option.part = attribute, part
        return option

    @property
    def kind(self) -> str:
        """The type of the attribute."""
        number = "int" if self.is_integer else "float"
        return number if self.part is None else f"tuple[{number}, ...]"


class Length(Function):
    """The number of components of an option."""

    nargs = 1
    is_integer = True


#: The number of axes of the tensor that a rank belongs to.
NDIM = Symbol("ndim", integer=True)


def options(names: str) -> tuple[Option, ...]:
    return tuple(Option(name) for name in names.split())


def indices(names: str) -> tuple[Index, ...]:
    """`indices("n r* o")`: a trailing star marks an index that stands for any number of axes."""
    return tuple(Index(name.rstrip("*"), name.endswith("*")) for name in names.split())


def tensors(names: str) -> tuple[IndexedBase, ...]:
    return tuple(IndexedBase(name) for name in names.split())


def base_name(index: Symbol) -> str:
    """The name that copies of one axis share: `o` of `o2` and of a fresh `o#7`."""
    return str(index.name.split("#")[0].rstrip("0123456789"))


class IndexSum(Expr):
    """Σ over whole index ranges: `IndexSum(body, Tuple(i, j))`. Written `Sum(body, i, j)`."""

    is_commutative = True
    precedence = 45  # between a sum and a product: Σ_i a b + c is (Σ_i a b) + c

    @property
    def body(self) -> Expr:
        return self.args[0]

    @property
    def over(self) -> tuple[Index, ...]:
        return tuple(self.args[1].args)

    def _sympystr(self, printer: Any) -> str:
        return f"Σ_{{{','.join(i.name for i in self.over)}}} {printer.parenthesize(self.body, 45)}"


def Sum(body: Expr, *over: Index) -> Expr:
    """Σ_over body."""
    return IndexSum(sympy.sympify(body), Tuple(*over)) if over else sympy.sympify(body)


class Extent(Function):
    """The number of values that an index takes."""

    nargs = 1
    is_positive = True
    is_integer = True

    def _sympystr(self, printer: Any) -> str:
        return self.args[0].name.upper()


extent = Extent


class Equal(Function):
    """1 where an index equals a value (another index, or an integer-valued tensor), else 0."""

    nargs = 2
    is_nonnegative = True

    def fdiff(self, argindex: int = 1) -> Expr:
        return Integer(0)

    def _sympystr(self, printer: Any) -> str:
        return f"[{printer.doprint(self.args[0])} = {printer.doprint(self.args[1])}]"


class After(Function):
    """1 where one index is greater than another, else 0."""

    nargs = 2
    is_nonnegative = True

    def _sympystr(self, printer: Any) -> str:
        return f"[{printer.doprint(self.args[0])} > {printer.doprint(self.args[1])}]"


class Access(Function):
    """Where an axis is read: `Access(axis, position, place)`, the position affine in `place` and one more index, the tap.

    A tensor is zero outside its range, and where the position is not an integer.
    """

    nargs = 3
    is_integer = True

    def _sympystr(self, printer: Any) -> str:
        return str(printer.doprint(self.args[1]))


class Centred(Expr):
    """`body` minus its mean over an index: what a variance squares. It may only be squared."""

    is_commutative = True
    precedence = 40

    @property
    def body(self) -> Expr:
        return self.args[0]

    @property
    def over(self) -> Index:
        return self.args[1]

    def _sympystr(self, printer: Any) -> str:
        return f"{printer.parenthesize(self.body, 46)} − mean_{self.over.name}"


class LogSumExp(Expr):
    """log Σ_over exp(body), evaluated stably; ∂/∂body = exp(body − value)."""

    is_commutative = True

    def __new__(cls, body: Expr, *over: Index) -> LogSumExp:
        return Expr.__new__(cls, sympy.sympify(body), *([over[0]] if isinstance(over[0], Tuple) else [Tuple(*over)]))

    @property
    def body(self) -> Expr:
        return self.args[0]

    @property
    def over(self) -> tuple[Index, ...]:
        return tuple(self.args[1].args)

    def _sympystr(self, printer: Any) -> str:
        return f"logsumexp_{{{','.join(i.name for i in self.over)}}} {printer.parenthesize(self.body, 45)}"


class finite(Function):
    """1 where a number is above −∞, else 0."""

    nargs = 1
    is_nonnegative = True

    def fdiff(self, argindex: int = 1) -> Expr:
        return Integer(0)


class sigmoid(Function):
    """1 / (1 + exp(−z)), stable for any z."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> Expr:
        if argindex != 1:
            raise ArgumentIndexError(self, argindex)
        value = sigmoid(self.args[0])
        return value * (1 - value)


class softplus(Function):
    """log(1 + exp(z)), stable for any z."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> Expr:
        if argindex != 1:
            raise ArgumentIndexError(self, argindex)
        return sigmoid(self.args[0])


def reads(expr: Expr) -> list[Indexed]:
    """Every tensor access in `expr`, in a fixed order."""
    return sorted(expr.atoms(Indexed), key=str)


def index_atoms(expr: Expr) -> set[Index]:
    """The indices that the value depends on; an extent does not depend on its index."""
    accesses = {access: access.args[1] for access in expr.atoms(Access)}
    return expr.xreplace({e: Symbol("extent") for e in expr.atoms(Extent)} | accesses).atoms(Index)


class Fresh:
    """Indices that occur nowhere else. Differentiating by a definition's own names would capture them."""

    def __init__(self) -> None:
        self._counter = itertools.count()

    def __call__(self, like: Index) -> Index:
        return Index(f"{like.name.split('#')[0]}#{next(self._counter)}", like.many)

    def all(self, likes: Iterable[Index]) -> tuple[Index, ...]:
        return tuple(self(like) for like in likes)


def plain_names(taken: Iterable[Index], rename: Iterable[Index]) -> dict[Index, Index]:
    """Readable names for fresh indices: the original name, primed by a digit where it is taken."""
    used = {index.name for index in taken}
    names: dict[Index, Index] = {}
    for index in rename:
        base = index.name.split("#")[0]
        name = next(candidate for candidate in _candidates(base) if candidate not in used)
        used.add(name)
        names[index] = Index(name, index.many)
    return names


def _candidates(base: str) -> Iterator[str]:
    yield base
    yield from (f"{base}{k}" for k in itertools.count(2))


ONE = Integer(1)
