"""Trees of tensor operations as PyTorch source: a product of two is what is recognised, or a matmul wherever its indices allow."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase

import sympy
from sympy import Expr

from ..calculus.terms import CalculusError
from ..definitions.quantities import S
from ..lowering.plan import (
    Add,
    Axes,
    Contract,
    Leaf,
    Map,
    Node,
    Permute,
    Products,
    Reduce,
    Scaled,
    extent_symbol,
)
from ..notation import After, Equal, Extent, Index, Option
from .aten_expr import AtenPrinter, is_postfix, postfix, repeated, sequence, threshold
from .recognised import RECOGNISED, geometry, window_gram


def _with_thresholds(node: Map) -> Map:
    """A product with a threshold that it reads as an operand, as one expression."""
    for read, child in zip(node.reads, node.children, strict=True):
        if not isinstance(child, Map) or child.axes != node.axes[len(node.axes) - len(child.axes) :]:
            continue
        if node.expr.is_Mul and read in node.expr.args and threshold(child.expr) is not None:
            others = [(r, c) for r, c in zip(node.reads, node.children, strict=True) if r is not read]
            reads, children = zip(*others, *zip(child.reads, child.children, strict=True), strict=True)
            return Map(node.expr.xreplace({read: child.expr}), reads, children, node.axes)
    return node


def _scaled_columns(node: Map) -> Expr | None:
    """The columns that a result is a multiple of, element by element."""
    for read, child in zip(node.reads, node.children, strict=True):
        if isinstance(child, Leaf) and child.name == S.name and child.axes == node.axes:
            return read if node.expr.is_Mul and read in node.expr.args else None
    return None


def _squared(node: Node) -> Node | None:
    """What the node is the squares of."""
    if not isinstance(node, Map) or len(node.children) != 1 or node.expr != node.reads[0] ** 2:
        return None
    (child,) = node.children
    return child if child.axes == node.axes else None


@dataclass
class Body:
    """The statements of one emitted function, with its local variables."""

    arguments: dict[str, Axes]
    lines: list[str] = field(default_factory=list)
    extents: set[sympy.Symbol] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)  # tensor → the expression that stands for it here
    result: Node | None = None  # what is computed in `out` where the operation can do that
    writes: bool = False

    def local(self, name: str, text: str) -> str:
        """A local variable for `text`; the same text is computed once."""
        for line in self.lines:
            left, _, right = line.partition(" = ")
            if right == text:
                return left
        taken = {line.partition(" = ")[0] for line in self.lines} | set(self.arguments)
        unique = name if name not in taken else next(f"{name}{k}" for k in range(2, 99) if f"{name}{k}" not in taken)
        self.lines.append(f"{unique} = {text}")
        return unique

    def out(self, node: Node) -> str:
        """Where an operation writes, if it gives the result."""
        if node is not self.result:
            return ""
        self.writes = True
        return ", out=out"

    def __call__(self, node: Node) -> str:
        match node:
            case Leaf():
                return self.leaf(node)
            case Map():
                return self._map(node)
            case Reduce(child=child, over=over):
                dims = [child.axes.index(i) for i in over]
                if isinstance(child, Map) and (text := self._is_value(child, over)):
                    return text
                squared = _squared(child)
                if squared is not None and dims == list(range(len(dims))):
                    return f"summed_squares({self(squared)}, {len(dims)})"
                if squared is not None and len(node.axes) == 1:
                    return f"squared_norms({self(squared)}, {child.axes.index(node.axes[0])})"
                if isinstance(child, Leaf) and all(i.many for i in over):  # often one position
                    return f"summed({self(child)}, {_tuple(dims)})"
                return f"{postfix(self(child))}.sum({_tuple(dims)})"
            case Permute(child=child, axes=axes):
                return f"{self.operand(child)}.permute({', '.join(str(child.axes.index(i)) for i in axes)})"
            case Scaled():
                return self._scaled(node)
            case Contract():
                return self._contract(node)
            case Products():
                return self._products(node)
            case Add():
                return self._add(node)

    def _add(self, node: Add) -> str:
        """`bar_centred - total[..., None] / J`."""
        text = ""
        for part in node.parts:
            value = self._aligned(self.operand(part), part.axes, node.axes) if part.axes != node.axes else self(part)
            sign = value.startswith("-")
            text += (" - " if sign else " + ") + value.removeprefix("-") if text else value
        return text

    def scalar(self, expr: Expr) -> str:
        """An expression of extents and numbers."""
        expr = expr.xreplace({e: extent_symbol(e.args[0]) for e in expr.atoms(Extent)})
        self.extents |= {s for s in expr.free_symbols if isinstance(s, sympy.Symbol) and not isinstance(s, Option)}
        if any(not power.exp.is_Integer for power in expr.atoms(sympy.Pow)):  # √2, say
            return AtenPrinter({}, scalars=frozenset(expr.free_symbols)).doprint(expr)
        return sympy.sstr(expr, order="none")

    def _scaled(self, node: Scaled) -> str:
        child = node.child
        numerator, denominator = node.coefficient.as_numer_denom()
        gram = self._gram(child) if isinstance(child, Contract) else None
        if gram is not None and numerator == 1 and denominator != 1:
            return f"{gram[:-1]}, over={self.scalar(denominator)}{self.out(node)})"
        text = f"({self(child)})" if isinstance(child, Map) and child.expr.is_Add else self(child)
        if numerator == -1:
            text = f"-{postfix(text)}"
        elif numerator != 1:
            text = f"{self.scalar(numerator)} * {text}"
        if denominator == 1:
            return text
        return f"{text} / {postfix(self.scalar(denominator))}"

    def stored(self, node: Leaf) -> str:
        """The whole tensor."""
        return self.renamed.get(node.name, node.name)

    def leaf(self, node: Leaf) -> str:
        text = self.stored(node)
        if node.windows:
            return self._windows(node, text)
        for i in reversed([i for i in node.stored if i not in node.axes]):
            text = f"{text}.squeeze({node.stored.index(i)})"
        axes = [i for i in node.stored if i in node.axes]
        for i in [i for i in dict.fromkeys(axes) if axes.count(i) == 2]:
            first = axes.index(i)
            text = f"{text}.diagonal(0, {first}, {axes.index(i, first + 1)})"
            axes = [*(j for j in axes if j != i), i]
        return text

    def _windows(self, node: Leaf, text: str) -> str:
        places, taps = (self.sizes([getattr(w, kind) for w in node.windows]) for kind in ("place", "tap"))
        transposed, numbers = geometry(self, node.windows)
        function = "transposed_windows" if transposed else "windows"
        return self.local("patches", f"{function}({self.stored(node)}, {places}, {taps}, {', '.join(numbers)})")

    def sizes(self, axes: Sequence[Index]) -> str:
        return sequence([self.scalar(Extent(i)) for i in axes])

    def operand(self, node: Node) -> str:
        """A node that a method is called on, or that is used more than once: parenthesised or named."""
        text = self(node)
        return text if isinstance(node, Leaf) else postfix(text)

    def _map(self, node: Map) -> str:
        if (text := self._into_gram(node)) is not None:
            return text
        given, node = node, _with_thresholds(node)
        names: dict[Expr, str] = {}
        like = self._like(node)
        for read, child in zip(node.reads, node.children, strict=True):
            whole = (
                isinstance(child, Map)
                and child.expr.is_Mul
                and node.expr.is_Mul
                and child.axes == node.axes[-len(child.axes) :]
            )
            text = self(child) if whole else self.operand(child)
            names[read] = self._aligned(text, child.axes, node.axes)
            like = self(child) if names[read] == like else like
        for equal in sorted(node.expr.atoms(Equal), key=str):
            names[equal] = self._equal(equal, node.axes, like, names)
        for after in sorted(node.expr.atoms(After), key=str):
            names[after] = self._after(after, node.axes, like)
        for e in sorted(node.expr.atoms(Extent), key=str):
            names[e] = self.scalar(e)
        for call in repeated(node.expr):
            if call not in names:
                names[call] = self.local(call.func.__name__, AtenPrinter(names, like).doprint(call))
        printer = AtenPrinter(names, like)
        text = printer.doprint(node.expr)
        if text.startswith("above(") and is_postfix(text):
            return f"{text[:-1]}{self.out(given)})"
        if given is self.result and (columns := _scaled_columns(node)) is not None:
            slope = self.local("slope", printer.doprint(node.expr / columns))
            return f"scaled({names[columns]}, {slope}{self.out(given)})"
        return text

    def _into_gram(self, node: Map) -> str | None:
        """A tensor times a Gram matrix, in the memory of that."""
        if node.expr != sympy.Mul(*node.reads) or len(node.children) != 2:
            return None
        for child, other in (node.children, node.children[::-1]):
            product = child.child if isinstance(child, Scaled) else child
            whole = isinstance(other, Leaf) and child.axes == other.axes == node.axes
            if whole and isinstance(product, Contract) and self._gram(product) is not None:
                text = self(child)
                return f"{text}.mul_({self(other)})" if is_postfix(text) else None
        return None

    def _like(self, node: Map) -> str:
        """A tensor whose dtype a mask takes: not one of the integers that it compares."""
        integers = {a.base for equal in node.expr.atoms(Equal) for a in equal.args if isinstance(a, sympy.Indexed)}
        pairs = zip(node.reads, node.children, strict=True)
        child = next((child for read, child in pairs if read.base not in integers), None)
        names = {str(base) for base in integers}
        return self(child) if child is not None else next(name for name in self.arguments if name not in names)

    def _equal(self, equal: Equal, axes: Axes, like: str, names: Mapping[Expr, str]) -> str:
        """δ of two indices is an identity matrix; of an index and integers, a one-hot mask."""
        index, value = equal.args
        symbol = self.scalar(Extent(index))
        if isinstance(value, Index):
            eye = f"torch.eye({symbol}, dtype={like}.dtype, device={like}.device)"
            order = (index, value) if axes.index(index) < axes.index(value) else (value, index)
            return self._aligned(self.local("eye", eye) if axes != order else eye, order, axes)
        counter = self.local("classes", f"torch.arange({symbol}, device={like}.device)")
        places = self._aligned(counter, (index,), axes)
        equality = f"{names[value]} == {places}" if value in names else f"{places} == {self.scalar(value)}"
        return f"({equality}).to({like}.dtype)"

    def _is_value(self, node: Map, over: Axes) -> str:
        """Σ_k [k = x] of integers x: whether x is among the values of k."""
        match node.expr, node.children, over:
            case Equal(args=(index, _)), (Leaf() as value,), (only,) if index == only and index not in value.axes:
                text = self(value)
                return f"(({text} >= 0) & ({text} < {self.scalar(Extent(index))})).to({self._like(node)}.dtype)"
        return ""

    def _after(self, after: After, axes: Axes, like: str) -> str:
        """A mask above or below a diagonal."""
        first, second = (
            self._aligned(f"torch.arange({self.scalar(Extent(i))}, device={like}.device)", (i,), axes)
            for i in after.args
        )
        return f"({first} > {second})"

    def _aligned(self, text: str, own: Axes, axes: Axes) -> str:
        """A tensor broadcast against `axes`: trailing axes match by themselves, missing ones are inserted."""
        if own == axes[len(axes) - len(own) :]:
            return text
        order = tuple(i for i in axes if i in own)
        if order != own:
            text = f"{text}.permute({', '.join(str(own.index(i)) for i in order)})"
        first = axes.index(order[0]) if order else 0
        places = [":" if i in own else "None" for i in axes[first:]]
        return text if "None" not in places else f"{text}[{', '.join(places)}]"

    def _contract(self, node: Contract) -> str:
        found = next((text for recognise in RECOGNISED if (text := recognise(self, node)) is not None), None)
        if found is not None:
            return found
        for left, right in ((node.left, node.right), (node.right, node.left)):
            text = self._matmul(left, right, node)
            if text is not None:
                return text
        spec = _spec(node.left.axes, node.right.axes, node.axes)
        function = "summed_products" if _by_column(node) else "torch.einsum"
        return f'{function}("{spec}", {self(node.left)}, {self(node.right)})'

    def _products(self, node: Products) -> str:
        """A product of matrices, where the operands share no other axis and have one of their own each."""
        stacked = []
        for operands in zip(*node.pairs, strict=True):
            texts = [self(part) if node.over in part.axes else f"{self.operand(part)}[None]" for part in operands]
            stacked.append((operands[0].axes, f"torch.cat(({', '.join(texts)}))"))
        for (left, first), (right, second) in (stacked, reversed(stacked)):
            if len(left) == len(right) == 2 and node.axes == (left[1], right[1]):
                return f"matmul({first}.T, {second})"
        (left, first), (right, second) = stacked
        return f'torch.einsum("{_spec(left, right, node.axes)}", {first}, {second})'

    def _matmul(self, left: Node, right: Node, node: Contract) -> str | None:
        a, b, over, out = left.axes, right.axes, node.over, node.axes
        batch = tuple(i for i in a if i in b and i not in over)
        rows = tuple(i for i in a if i not in b)
        columns = tuple(i for i in b if i not in a)
        if not rows and not columns and batch == out == tuple(i for i in b if i in batch):
            if a != b:
                return None
            product = f"{self.operand(left)} * {self.operand(right)}"
            return f"({product}).sum({_tuple([a.index(i) for i in over])})"
        if not batch and len(over) == 1 and len(columns) == 1 and out == (*rows, *columns) and a == (*rows, *over):
            first = self(left)
            second = self.operand(right) + ("" if b == (*over, *columns) else ".T")
            return f"matmul({first}, {second}{self.out(node)})"
        if (grouped := self._grouped(left, right, node)) is not None:
            first, second = grouped
            call = f"gram({first}" if first == second else f"matmul({first}.T, {second}"
            return f"{call}{self.out(node)})"
        if len(over) == 1 and len(columns) == 1 and rows and b[:-2] == batch and out[-2:] == (rows[-1], columns[0]):
            lead = a[:-2]
            if lead == out[:-2] and lead[len(lead) - len(batch) :] == batch:
                first = self.operand(left) + ("" if a[-2:] == (rows[-1], *over) else ".transpose(-2, -1)")
                second = self.operand(right) + ("" if b[-2:] == (*over, *columns) else ".transpose(-2, -1)")
                return f"matmul({first}, {second}{self.out(node)})"
        return None

    def _gram(self, node: Contract) -> str | None:
        """A symmetric product that can be divided as it is computed."""
        if (windows := window_gram(self, node)) is not None:
            return windows
        first, second = self._grouped(node.left, node.right, node) or ("", None)
        return f"gram({first})" if first == second else None

    def _grouped(self, left: Node, right: Node, node: Contract) -> tuple[str, str] | None:
        """The operands of a product of two matrices over all axes but the last of both, as matrices."""
        rows, columns, over = left.axes[len(node.over) :], right.axes[len(node.over) :], node.over
        leading = left.axes[: len(over)] == right.axes[: len(over)] == over
        if not (leading and len(rows) == len(columns) == 1 and node.axes == (*rows, *columns)):
            return None
        return self._flattened(left, len(over)), self._flattened(right, len(over))

    def _flattened(self, node: Node, leading: int) -> str:
        """Leading axes as one; an operation (not an argument) is computed once and named."""
        text = self(node)
        if not isinstance(node, Leaf):
            text = self.local({Reduce: "total", Map: "values"}.get(type(node), "product"), text)
        return text if leading == 1 else f"{text}.flatten(0, {leading - 1})"


def _by_column(node: Contract) -> bool:
    """Whether one operand has the axes of the other and columns before them, and the result those that are left, in order."""
    small, large = sorted((node.left.axes, node.right.axes), key=len)
    lead = len(large) - len(small)
    return lead > 0 and large[lead:] == small and node.axes == tuple(i for i in large if i not in node.over)


def _tuple(dims: Sequence[int]) -> str:
    return str(dims[0]) if len(dims) == 1 else f"({', '.join(map(str, dims))})"


def _spec(left: Axes, right: Axes, out: Axes) -> str:
    """What einsum takes."""
    letters = _letters((*left, *right))
    first, second, third = ("".join(letters[i] for i in axes) for axes in (left, right, out))
    return f"{first},{second}->{third}"


def _letters(axes: Axes) -> dict[Index, str]:
    """One letter per index: its own where it is free."""
    letters: dict[Index, str] = {}
    for i in dict.fromkeys(axes):
        letter = i.name[0].upper() if i.name[1:].isdigit() else i.name
        own = letter if len(letter) == 1 and letter not in letters.values() else ""
        letters[i] = own or next(
            c for c in ascii_lowercase if c not in letters.values() and c not in {j.name for j in axes}
        )
    return letters


def unpack_extents(
    needed: set[sympy.Symbol], arguments: Mapping[str, Axes], shapes: Mapping[str, Axes] | None = None
) -> list[str]:
    """`N, R, _ = input.shape` for the extents that are needed, from the first argument, or shape, that has them."""
    lines = []
    missing = set(needed)
    sources = {f"{name}.shape": axes for name, axes in arguments.items()} | dict(shapes or {})
    for name, axes in sources.items():
        names = [extent_symbol(i) for i in axes]
        found = [s for s in names if s in missing]
        if not found:
            continue
        missing -= set(found)
        if len(set(found)) == 1:
            lines.append(f"{found[0]} = {name}[{names.index(found[0])}]")
        else:
            places = [str(s) if s in found and names.index(s) == k else "_" for k, s in enumerate(names)]
            if places[:2] == ["_", "_"]:
                places = ["*_", *itertools.dropwhile("_".__eq__, places)]
            lines.append(f"{', '.join(places)} = {name}")
    if missing:
        raise CalculusError(f"no argument of {sorted(arguments)} carries the extents {sorted(map(str, missing))}")
    return lines
