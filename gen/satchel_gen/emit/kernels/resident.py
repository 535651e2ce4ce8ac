"""Context of a kernel whose rows stay in registers: reductions and elementwise values in stages, then one store per column."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sympy import Expr, Pow, Symbol

from ...lowering.programs import Axes, Read, Resident, Stage
from ...notation import Extent
from ..aten_expr import sequence
from ..triton_axes import Group, Names, decode, offset, plus, product, scaled, used
from ..triton_expr import Lines, TritonPrinter, hoist
from .context import (
    Context,
    hoisted_name,
    launcher,
    number_arguments,
    number_casts,
    out_shape,
    pointers,
    printer_for,
)

RESERVED = frozenset(
    ["out", "out_ptr", "row", "rows", "row_inside", "inside", "lane", "origin", "start", "size", "columns"]
)


@dataclass
class Sections:
    """Statements before the loop over columns, and in it; which symbols vary along a row, and with the column."""

    printer: TritonPrinter
    along: set[str]
    moving: set[str]
    before: list[str] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)
    parts: dict[Expr, Expr] = field(default_factory=dict)
    fixed: dict[Expr, str] = field(default_factory=dict)

    def divide_once(self, exprs: Iterable[Expr]) -> None:
        """Division by an extent as a product with its inverse: an inlined float64 division costs time and registers."""
        inverses = {
            part for expr in exprs for part in expr.atoms(Pow) if isinstance(part.base, Extent) and part.exp == -1
        }
        for inverse in sorted(inverses, key=str):
            self.parts[inverse] = Symbol(self._fixed(inverse))
        self.before += self.printer.lines.statements

    def depends(self, expr: Expr, on: set[str]) -> bool:
        return bool({str(symbol) for symbol in expr.free_symbols} & on)

    def stage(self, stage: Stage) -> None:
        expr = stage.expr.xreplace(self.parts)
        moving = self.depends(expr, self.moving)
        if moving:
            self.moving.add(stage.name)
        target = self.inside if moving else self.before
        if stage.kind == "value":
            if self.depends(expr, self.along):
                self.along.add(stage.name)
            target += self._lines(expr, moving, stage.name)
        elif stage.kind == "sum":
            coefficient, summand = expr.as_independent(*map(self._symbol, self.along), as_Add=False)
            statements, code = self.value(summand, moving)
            total = Symbol("total")
            self.printer.values["total"] = _reduced("sum", code, "0.0")
            target += [*statements, *self._lines(coefficient * total, moving, stage.name)]
        else:
            target += self._logsumexp(stage.name, *self.value(expr, moving))

    def value(self, expr: Expr, moving: bool) -> tuple[list[str], str]:
        """The statements that a value needs, and its code. What no column changes is computed before the loop."""
        lines = self.printer.lines
        if moving:
            lines.statements = []
            known = {part: Symbol(name) for part, name in self.fixed.items()}
            expr = hoist(expr.xreplace(known), frozenset(self.moving | {"total"}), self._fixed, frozenset(self.along))
            self.before += lines.statements
        lines.statements = []
        code = self.printer.statements(expr)
        return lines.statements, code

    def _lines(self, expr: Expr, moving: bool, name: str) -> list[str]:
        statements, code = self.value(expr, moving)
        return [*statements, f"{name} = {code}"]

    def _fixed(self, expr: Expr) -> str:
        if expr not in self.fixed:
            self.fixed[expr] = hoisted_name(self.printer, self.printer.lines)(expr)
        return self.fixed[expr]

    def _logsumexp(self, name: str, statements: list[str], code: str) -> list[str]:
        """As maximum plus tail: (f - max) - tail keeps the digits that f - (max + tail) loses."""
        peak, tail = f"{name}_max", f"{name}_tail"
        self.parts[self._symbol(name)] = Symbol(peak) + Symbol(tail)
        self.printer.values |= {peak: peak, tail: tail}
        greatest = _reduced("max", code, 'float("-inf")')
        summed = _reduced("sum", f"tl.exp({code} - {peak})", "0.0")
        return [*statements, f"{peak} = {greatest}", f"{tail} = tl.log({summed})"]

    @staticmethod
    def _symbol(name: str) -> Symbol:
        return Symbol(name, real=True)


def _reduced(operation: str, code: str, outside: str) -> str:
    return f"tl.{operation}(tl.where(inside, {code}, {outside}), axis=0, keep_dims=True)"


def resident(definition: str, program: Resident) -> Context:
    names = Names(program, RESERVED)
    column, element, row, after = program.out[0], program.out[1:], program.row, program.after
    numbering = tuple(axis for axis in element if axis not in row)
    lane = names.index(row)
    index = {axis: names.index((axis,)) for axis in (*numbering, *row, column)}
    indexed: set[str] = set()

    def where(axes: Axes) -> str:
        if axes[-len(element) :] == element:
            return plus("start" if axes == program.out else "", "origin", scaled(lane, names.extents(after)))
        if axes == row:
            return lane
        indexed.update(axes)
        sizes: dict[Group, str] = {(axis,): names.extent(axis) for axis in axes}
        return offset([(axis,) for axis in axes], {(axis,): index[axis] for axis in axes}, sizes)

    def load(read: Read) -> str:
        mask = "inside" if set(read.axes) & set(row) else "row_inside"
        value = names.value(read)
        return f"{value} = tl.load({read.tensor}_ptr + {where(read.axes)}, mask={mask}, other=0).to(COMPUTE)"

    stage_names = [stage.name for stage in program.stages]
    reserved = {*RESERVED, *index.values(), *stage_names, *(names.value(read) for read in program.reads), "total"}
    printer = printer_for(definition, program, names, {}, Lines(reserved), stage_names)
    whole = [read for read in program.reads if column in read.axes]
    sections = Sections(
        printer,
        along={read.symbol for read in program.reads if set(read.axes) & set(row)},
        moving={read.symbol for read in whole},
    )
    sections.divide_once([*(stage.expr for stage in program.stages), program.expr])
    for read in program.reads:
        (sections.inside if read in whole else sections.before).append(load(read))
    for stage in program.stages:
        sections.stage(stage)
    statements, result = sections.value(program.expr.xreplace(sections.parts), moving=True)
    sections.inside += statements
    decoded = _decoded(program, names, index, indexed, lane)
    before = [*decoded, f"origin = {_origin(program, names)}", *number_casts(program, names), *sections.before]
    code = [*before, *sections.inside, result, where(program.out), product(names.extents(row))]
    sizes = {"columns": "columns", "rows": "rows", "size": "size"}
    sizes |= {extent: extent for extent in used(names.extents(program.out), code)}
    numbers = number_arguments(program, names)
    rows, size = product(names.extents(numbering)), product(names.extents(element))
    stride = product(names.extents(program.after))
    launch = launcher(program, [rows, size, names.extent(column), *out_shape(program)], sizes)
    launch |= {
        "rows": rows, "columns": names.extent(column), "size": size, "row_size": product(names.extents(row)), "stride": stride,
        "out": sequence(out_shape(program)), "sizes": (*sizes.values(), *numbers.values()),
    }  # fmt: skip
    return {
        "name": program.name, "doc": program.doc, "value": program.value, "pointers": pointers(program), "sizes": (*sizes, *numbers),
        "lane": lane, "row_size": product(names.extents(row)), "row_inside": bool(used(["row_inside"], code)),
        "before": before, "column": index[column], "inside": sections.inside, "result": result,
        "where": where(program.out), "launch": launch,
    }  # fmt: skip


def _origin(program: Resident, names: Names) -> str:
    """Where a row begins."""
    row = [names.extent(axis) for axis in program.row]
    if not program.after:
        return scaled("row.to(tl.int64)", row)
    inner = names.extents(program.after)
    stride = product(inner) if len(inner) == 1 else f"({product(inner)})"
    return f"{scaled(f'(row // {stride}).to(tl.int64)', [*row, *inner])} + row % {stride}"


def _decoded(program: Resident, names: Names, index: dict[str, str], indexed: set[str], lane: str) -> list[str]:
    """The indices of single axes that some tensor needs, from the number of the row and from the place in it."""
    numbering = [axis for axis in program.out[1:] if axis not in program.row]
    lines = []
    for flat, axes in (("row", numbering), (lane, list(program.row))):
        groups: list[Group] = [(axis,) for axis in axes]
        sizes: dict[Group, str] = {(axis,): names.extent(axis) for axis in axes}
        statements = decode(flat, groups, sizes, {(axis,): index[axis] for axis in axes}, widen=flat == "row")
        lines += [statements[(axis,)] for axis in axes if axis in indexed and index[axis] != flat]
    return lines
