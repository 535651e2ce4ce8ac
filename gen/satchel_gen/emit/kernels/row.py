"""Context of a kernel that reduces along one axis in stages, then writes an expression of the stages.

A row that fits into registers is read once, before the stages; a longer one step by step, in each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sympy

from ...lowering.programs import Axes, Read, Row
from ...notation import Equal
from ..aten_expr import sequence
from ..triton_axes import Group, Names, decode, plus, product, scaled, used
from ..triton_expr import Lines, hoist
from .context import (
    KERNEL_NAMES,
    Context,
    delta_axes,
    divided,
    flat_offset,
    hoisted_name,
    launcher,
    loop_head,
    out_shape,
    pointers,
    printer_for,
    used_in,
)


def row(definition: str, program: Row) -> Context:
    names = Names(program, KERNEL_NAMES)
    first, k, out = program.reads[0], program.row, program.out
    row_axes = tuple(axis for axis in first.axes if axis != k)
    columns = tuple(axis for axis in out if axis not in first.axes)
    axes = {axis: names.index((axis,)) for axis in (*out, k)}
    single: dict[Group, str] = {(axis,): names.extent(axis) for axis in (*out, k)}
    index_names: dict[Group, str] = {(axis,): axes[axis] for axis in (*out, k)}
    expressions = [stage.expr for stage in program.stages] + [program.expr]
    compared = frozenset(axis for expr in expressions for axis in delta_axes(expr, (*out, k)))
    indexed = set(compared)

    def where(layout: Axes) -> str:
        if layout == row_axes:
            return "row"
        if len(columns) > 1 and layout[: len(columns)] == columns:
            rest = layout[len(columns) :]
            return plus(scaled("column", names.extents(rest)), where(rest))
        indexed.update(axis for axis in layout if axis != k)
        return flat_offset(layout, layout, axes, names)

    def load(read: Read, mask: str) -> list[str]:
        value = names.value(read)
        lines = [f"{value} = tl.load({read.tensor}_ptr + {where(read.axes)}, mask={mask}, other=0)"]
        return [lines[0] + ("" if _compared_only(read, expressions) else ".to(COMPUTE)")] + (
            [f"{value} = {value} * {value}"] if read.square else []
        )

    in_use = [read for read in program.reads if any(used_in(read, expr) for expr in expressions)]
    per_tile = [read for read in in_use if k in read.axes]
    per_column = [read for read in in_use if k not in read.axes and set(read.axes) & set(columns)]
    per_row = [read for read in in_use if read not in per_tile and read not in per_column]
    out_offset = where(out)
    stage_names = [stage.name for stage in program.stages]
    lines = Lines(
        set(KERNEL_NAMES) | set(axes.values()) | set(stage_names) | {names.value(read) for read in program.reads}
    )
    printer = printer_for(definition, program, names, axes, lines, stage_names)

    def tile(expr: sympy.Expr) -> Context:
        lines.statements = []
        loads = [line for read in per_tile if used_in(read, expr) for line in load(read, "inside")]
        value = printer.statements(expr)
        return {"loads": loads, "statements": lines.statements, "value": value}

    lines.statements = []
    varying = compared | {*stage_names, *(read.symbol for read in in_use)}
    final = hoist(sympy.sympify(program.expr), varying, hoisted_name(printer, lines))
    before = lines.statements + [line for read in per_row for line in load(read, "row_inside")]
    stages: list[Context] = []
    parts: dict[str, sympy.Expr] = {}
    for stage in program.stages:
        loop = _stage(stage.name, stage.kind, tile(_replaced(stage.expr, parts)), lines)
        if stage.kind == "logsumexp":
            peak, tail = loop["peak"], f"{stage.name}_tail"
            parts[stage.name] = sympy.Symbol(peak) + sympy.Symbol(tail)
            printer.values |= {peak: peak, tail: tail}
        stages.append(loop)
    lines.statements = [line for read in per_column for line in load(read, "row_inside")]
    tiled = frozenset({read.symbol for read in per_tile} | {k})
    expr = hoist(_replaced(final, parts), tiled, hoisted_name(printer, lines))
    column_lines = lines.statements
    result = tile(expr)
    decode_rows = decode("row", [(a,) for a in row_axes], single, index_names)
    before = [decode_rows[(axis,)] for axis in row_axes if axis in indexed] + before
    if columns and len(columns) > 1:
        decode_columns = decode("index", [(a,) for a in columns], single, index_names)
        of_columns = [decode_columns[(axis,)] for axis in columns if axis in indexed]
        column_lines = (["column = tl.cast(index, tl.int64)", *of_columns] if of_columns else []) + column_lines
    elif not columns:
        before_out, column_lines = column_lines, []
        if before_out:
            stages[-1]["after"] = [*stages[-1]["after"], *before_out]
    whole = [line for read in per_tile for line in load(read, "inside")]
    code = [*before, *whole, *column_lines, *result["statements"], result["value"], out_offset, names.extent(k)]
    code += [line for stage in stages for line in (*stage["statements"], *stage["updates"], *stage["after"])]
    extents = used([names.extent(axis) for axis in (*first.axes, *out)], code)
    sizes = {**({"columns": "columns"} if columns else {}), "rows": "rows", **{extent: extent for extent in extents}}
    rows, count = product(names.extents(row_axes)), product(names.extents(columns))
    launch = launcher(program, [rows, count if columns else "", *out_shape(program)], sizes)
    stride = product(names.extents(first.axes[first.axes.index(k) + 1 :]))
    launch |= {
        "rows": rows,
        "columns": count,
        "row_size": names.extent(k),
        "stride": stride,
        "out": sequence(out_shape(program)),
    }
    return {
        "name": program.name, "doc": program.doc, "pointers": pointers(program), "sizes": tuple(sizes), "k": axes[k],
        "row_size": names.extent(k), "before": before, "whole": whole, "stages": stages, "per_column": column_lines,
        "column": (axes[columns[0]] if len(columns) == 1 else "column") if columns else "",
        "result": result, "out_offset": out_offset, "launch": launch,
        "loop": loop_head(axes[columns[0]] if len(columns) == 1 else "column", "columns", 1, divided(column_lines))
        if columns else "",
    }  # fmt: skip


def _replaced(expr: sympy.Expr, parts: Mapping[str, sympy.Expr]) -> sympy.Expr:
    """A logsumexp as maximum plus tail: (f - max) - tail keeps the digits that f - (max + tail) loses."""
    expr = sympy.sympify(expr)
    return expr.xreplace({symbol: parts[symbol.name] for symbol in expr.free_symbols if symbol.name in parts})


def _compared_only(read: Read, expressions: Iterable[sympy.Expr]) -> bool:
    """Whether a tensor holds indices: it occurs in deltas and nowhere else."""
    bare = [expr.replace(Equal, lambda *_: sympy.Integer(1)) for expr in expressions]
    return not any(used_in(read, expr) for expr in bare)


def _stage(name: str, kind: str, tile: Context, lines: Lines) -> Context:
    """The loop of one reduction over the row axis: what it starts from, and what each tile adds.

    A logsumexp is a maximum and a sum of exponentials shifted by it, which shrinks wherever the maximum rises.
    """
    value = tile["value"]
    lowest = 'float("-inf")'
    greatest = f"tl.max(tl.where(inside, {value}, {lowest}), axis=0, keep_dims=True)"
    if kind == "max":
        return {**tile, "initial": {name: lowest}, "updates": [f"{name} = tl.maximum({name}, {greatest})"], "after": []}
    if kind == "sum":
        update = f"{name} = {name} + tl.sum(tl.where(inside, {value}, 0.0), axis=0, keep_dims=True)"
        return {**tile, "initial": {name: "0.0"}, "updates": [update], "after": []}
    peak, mass, higher, shift = (lines.fresh(f"{name}_{part}") for part in ("max", "sum", "higher", "shift"))
    shifted = f"tl.exp({value if value.isidentifier() else f'({value})'} - {shift})"
    updates = [
        f"{higher} = tl.maximum({peak}, {greatest})",
        f"{shift} = tl.where({higher} == {lowest}, 0.0, {higher})",
        f"{mass} = {mass} * tl.exp({peak} - {shift}) + tl.sum(tl.where(inside, {shifted}, 0.0), axis=0, keep_dims=True)",
        f"{peak} = {higher}",
    ]
    after = [f"{name}_tail = tl.log({mass})"]
    return {**tile, "initial": {peak: lowest, mass: "0.0"}, "updates": updates, "after": after, "peak": peak}
