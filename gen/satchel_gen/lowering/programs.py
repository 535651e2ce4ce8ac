"""Program shapes: what a formula becomes before it is printed, as frozen data over named axes.

A tensor is contiguous over its axes, in their order; extents arrive with the tensors. A program says what is summed when;
which axes may be walked as one (they are adjacent wherever they occur) is found by the printer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import sympy

from ..formula import render
from ..notation import Option
from .plan import Window

Axes = tuple[str, ...]
BLOCK_M, BLOCK_N = sympy.symbols("BLOCK_M BLOCK_N", positive=True, integer=True)  # sides of a tile of the result


@dataclass(frozen=True)
class Read:
    """One access: the axes of a tensor, the name it has in expressions, and whether it is squared on load.

    An axis with a window is read at affine positions; the last axes are.
    """

    tensor: str
    axes: Axes
    square: bool = False
    alias: str = ""
    windows: tuple[Window, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.axes)) != len(self.axes):
            raise ValueError(f"read of {self.tensor!r}: axis repeated in {self.axes}")

    @property
    def symbol(self) -> str:
        return self.alias or self.tensor

    @property
    def plain(self) -> Axes:
        """The axes that are read where they are walked."""
        return self.axes[: len(self.axes) - len(self.windows)]

    @property
    def walked(self) -> Axes:
        """The axes of the iteration that this access depends on."""
        places, taps = ([getattr(w, kind).name for w in self.windows] for kind in ("place", "tap"))
        return (*self.plain, *places, *taps)


@dataclass(frozen=True, kw_only=True)
class Program:
    """What all shapes share: a function name, its formula, the axes of the result, and the order of its tensors.

    `equal` gives an axis that no tensor carries the extent of one that is carried: {"v": "j"} for the columns of a diagonal
    factor. The first `columns` axes of `out` are returned as one. `signature` orders the launcher's tensors; empty: the order
    of the reads. After them come `shapes`, of tensors that are not read but carry extents, and `options`, numbers of the
    module.
    """

    name: str
    doc: str
    out: Axes
    equal: Mapping[str, str] = field(default_factory=dict)
    columns: int = 1
    signature: tuple[str, ...] = ()
    shapes: Mapping[str, Axes] = field(default_factory=dict)
    options: tuple[Option, ...] = ()

    @property
    def all_reads(self) -> tuple[Read, ...]:
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[str, ...]:
        read = tuple(dict.fromkeys(read.tensor for read in self.all_reads))
        if self.signature and set(self.signature) != set(read):
            raise ValueError(f"program {self.name!r}: signature {self.signature} does not list its tensors {read}")
        return self.signature or read

    def loads(self, read: Read) -> sympy.Expr:
        """How often a launch loads each element that a read walks over: once, unless tiles or steps share it."""
        return sympy.Integer(1)

    @property
    def reuse(self) -> str:
        """How often a launch reads its tensors, in words."""
        loads = {read.tensor: self.loads(read) for read in self.all_reads}
        again = ", ".join(f"{tensor} {render(times)} times" for tensor, times in loads.items() if times != 1)
        return f"reads {again or 'each tensor once'}"

    def extent(self, axes: Iterable[str]) -> sympy.Expr:
        return sympy.Mul(*(sympy.Symbol(self.equal.get(a, a).upper(), positive=True, integer=True) for a in axes))

    def require(self, condition: bool, reason: str) -> None:
        if not condition:
            raise ValueError(f"program {self.name!r}: {reason}")

    def require_known(self, axes: Iterable[str]) -> None:
        known = {axis for read in self.all_reads for axis in (*read.axes, *read.walked)} | set(self.equal)
        unknown = [axis for axis in axes if axis not in known]
        self.require(not unknown, f"axes {unknown} are carried by no tensor")


@dataclass(frozen=True, kw_only=True)
class Pointwise(Program):
    """out = expr(reads), each read broadcast over the axes it lacks; the result is float32 or wider."""

    reads: tuple[Read, ...]
    expr: sympy.Expr

    def __post_init__(self) -> None:
        self.require_known(self.out)

    @property
    def all_reads(self) -> tuple[Read, ...]:
        return self.reads


@dataclass(frozen=True, kw_only=True)
class Contraction(Program):
    """out = Σ_{accumulate, within} weight · g(Σ_sums a·b), where g squares (square_epilogue) or is the identity.

    `accumulate` is summed step by step in one tile, `within` over the elements of the tiles.
    """

    a: Read
    b: Read
    sums: Axes
    accumulate: Axes = ()
    within: Axes = ()
    square_epilogue: bool = False
    weight: Read | None = None

    def __post_init__(self) -> None:
        self.require_known((*self.out, *self.sums, *self.accumulate, *self.within))
        self.require(bool(self.sums), "a contraction sums at least one axis before its epilogue")
        self.require(
            all(axis in self.a.walked and axis in self.b.walked for axis in self.sums),
            f"the inner sums {self.sums} must be axes of both {self.a.tensor!r} and {self.b.tensor!r}",
        )

    @property
    def all_reads(self) -> tuple[Read, ...]:
        return (self.a, self.b) if self.weight is None else (self.a, self.b, self.weight)

    @property
    def sides(self) -> tuple[Read, Read]:
        """The operands along the rows and along the columns of a tile: the last axis that is kept lies along a row."""
        last = (*self.out, *self.within)[-1]
        return (self.a, self.b) if last in self.b.walked else (self.b, self.a)

    def loads(self, read: Read) -> sympy.Expr:
        """Once for each step and for each tile along a side that the read lacks."""
        rows, columns = self.sides
        kept = {axis: (axis in rows.walked, axis in columns.walked) for axis in (*self.out, *self.within)}
        steps = (*self.accumulate, *(axis for axis, walked in kept.items() if all(walked)))
        times = self.extent(axis for axis in steps if axis not in read.walked)
        for walked, block in (((True, False), BLOCK_M), ((False, True), BLOCK_N)):
            side = [axis for axis in kept if kept[axis] == walked]
            if not set(side) & set(read.walked):
                times *= sympy.ceiling(self.extent(side) / block)
        return times


@dataclass(frozen=True, kw_only=True)
class Gram(Program):
    """out = Σ_outer Σ_{r,r'} (Σ_rest a[…, r, …] a[…, r', …]) (Σ_rest b[…, r, …] b[…, r', …]).

    `rows` is the shared axis r; what remains of a's and b's axes after `out`, `outer` and `rows` is contracted.
    """

    a: Read
    b: Read
    rows: str
    outer: Axes = ()

    def __post_init__(self) -> None:
        self.require_known((*self.out, *self.outer, self.rows))
        self.require(self.rows in self.a.axes and self.rows in self.b.axes, f"both reads need the axis {self.rows!r}")
        self.require(not set(self.outer) & set(self.b.axes), f"{self.b.tensor!r} must lack the outer axes {self.outer}")

    @property
    def all_reads(self) -> tuple[Read, ...]:
        return (self.a, self.b)

    def loads(self, read: Read) -> sympy.Expr:
        """Tiles on and above the diagonal: each block of rows meets each other one once, and itself from both sides."""
        return sympy.ceiling(self.extent([self.rows]) / BLOCK_M) + 1


@dataclass(frozen=True, kw_only=True)
class Reduce(Program):
    """out = Σ_outer weight · g(Σ_inner read), where g squares (square) or is the identity."""

    read: Read
    inner: Axes = ()
    square: bool = False
    outer: Axes = ()
    weight: Read | None = None

    def __post_init__(self) -> None:
        self.require_known((*self.out, *self.inner, *self.outer))
        self.require(bool(self.inner or self.outer), "a reduction sums at least one axis")
        summed = (*self.out, *self.inner, *self.outer)
        self.require(sorted(summed) == sorted(self.read.axes), f"{summed} are not the axes of {self.read.tensor!r}")

    @property
    def all_reads(self) -> tuple[Read, ...]:
        return (self.read,) if self.weight is None else (self.read, self.weight)


@dataclass(frozen=True)
class Stage:
    """A named value: `expr` itself, or its reduction over the row by "max", "sum" or "logsumexp"."""

    name: str
    kind: str
    expr: sympy.Expr

    def __post_init__(self) -> None:
        if self.kind not in ("value", "max", "sum", "logsumexp"):
            raise ValueError(f"stage {self.name!r}: unknown kind {self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class Row(Program):
    """Reductions over one axis, then out = expr(reads, stages); the result is float32 or wider.

    The first read carries the row axis; its other axes number the rows. Axes of `out` that it lacks are columns.
    A read that lacks the row axis but carries a column axis is loaded once per column.
    """

    reads: tuple[Read, ...]
    row: str
    stages: tuple[Stage, ...]
    expr: sympy.Expr

    def __post_init__(self) -> None:
        self.require_known((*self.out, self.row))
        self.require(self.row in self.reads[0].axes, f"the first read lacks the row axis {self.row!r}")
        self.require(set(self.reads[0].axes) <= set(self.out), "the result must carry all axes of the first read")

    @property
    def all_reads(self) -> tuple[Read, ...]:
        return self.reads


@dataclass(frozen=True, kw_only=True)
class Resident(Program):
    """Stages over rows that stay in registers, each tensor loaded once; then out = expr(reads, stages).

    The first axis of `out` numbers columns, `row` are the axes of a row, side by side in `out`, and its other axes number the
    rows. What depends on no column is computed before the loop over columns.
    """

    reads: tuple[Read, ...]
    row: Axes
    stages: tuple[Stage, ...]
    expr: sympy.Expr

    def __post_init__(self) -> None:
        self.require_known((*self.out, *self.row))
        first = self.out.index(self.row[0])
        self.require(first > 0, "the first axis of the result numbers columns")
        self.require(self.out[first : first + len(self.row)] == self.row, f"the axes {self.row} of a row lie apart")
        for read in self.reads:
            whole = read.axes in (self.out, self.out[1:])
            self.require(whole or self.out[0] not in read.axes, f"{read.tensor!r} has columns, but not all other axes")

    @property
    def all_reads(self) -> tuple[Read, ...]:
        return self.reads

    @property
    def value(self) -> str:
        """The formula of the result, without its intermediates."""
        return self.doc.splitlines()[-1].strip()

    @property
    def after(self) -> Axes:
        """The axes inside of the row's."""
        return self.out[self.out.index(self.row[-1]) + 1 :]
