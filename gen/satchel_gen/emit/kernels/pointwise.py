"""Context of a pointwise kernel: blocks of elements, a loop over leading axes; what lacks them is read once, before it."""

from __future__ import annotations

import sympy

from ...lowering.programs import Axes, Pointwise
from ..aten_expr import sequence
from ..triton_axes import Group, Names, decode, product, used
from ..triton_expr import Lines, hoist
from .context import (
    KERNEL_NAMES,
    Context,
    delta_axes,
    divided,
    extent_axes,
    flat_offset,
    hoisted_name,
    launcher,
    loop_head,
    number_arguments,
    number_casts,
    out_shape,
    printer_for,
    used_in,
    used_pointers,
)


def pointwise(definition: str, program: Pointwise) -> Context:
    names = Names(program, KERNEL_NAMES)
    out, expr = program.out, sympy.sympify(program.expr)
    loop = _looped(program)
    rest = out[len(loop) :]
    axes = {axis: names.index((axis,)) for axis in out}
    indexed = set(delta_axes(expr, out))
    loads: dict[bool, list[str]] = {False: [], True: []}
    for read in program.reads:
        if not used_in(read, expr):
            continue
        outer = [axis for axis in read.axes if axis in loop]
        inner = tuple(axis for axis in read.axes if axis not in loop)
        program.require(read.axes == (*outer, *inner), f"{read.tensor!r} must have its axes in the order of {out}")
        if read.axes == out and loop:
            where = "base + lane"
        elif inner == rest:
            where = "start + lane"
        else:
            where = flat_offset(read.axes, read.axes, axes, names)
            indexed |= set(inner)
        indexed |= set(outer) if read.axes != out else set()
        value = names.value(read)
        loads[bool(outer)].append(f"{value} = tl.load({read.tensor}_ptr + {where}, mask=inside, other=0).to(COMPUTE)")
        loads[bool(outer)] += [f"{value} = {value} * {value}"] if read.square else []
    single: dict[Group, str] = {(axis,): names.extent(axis) for axis in out}
    index_names: dict[Group, str] = {(axis,): axes[axis] for axis in out}
    decode_rest = decode("element", [(a,) for a in rest], single, index_names, widen=False)
    decode_loop = decode("index", [(a,) for a in loop], single, index_names)
    column = (axes[loop[0]] if len(loop) == 1 else "column") if loop else ""
    before = [decode_rest[(axis,)] for axis in rest if axis in indexed]
    before = ["element = start + lane", *before] if before else []
    if len(rest) == 1 and before:
        before = [f"{axes[rest[0]]} = start + lane"]
    inside = [decode_loop[(axis,)] for axis in loop if axis in indexed] if len(loop) > 1 else []
    inside = ["column = tl.cast(index, tl.int64)", *inside] if inside else []
    inside += [f"base = {column} * size + start"] if loop else []
    moving = frozenset({read.symbol for read in program.reads if set(read.axes) & set(loop)} | set(loop))
    numbers = number_arguments(program, names)
    lines = Lines(
        set(KERNEL_NAMES)
        | {names.value(read) for read in program.reads}
        | {names.option(option) for option in program.options}
        | set(axes.values())
    )
    printer = printer_for(definition, program, names, axes, lines)
    if loop:
        expr = hoist(expr, moving, hoisted_name(printer, lines))
    before += number_casts(program, names) + loads[False] + lines.statements
    lines.statements = []
    result = printer.statements(expr)
    inside += loads[True] + lines.statements
    if not loop:
        before += loads[True] + lines.statements
    code = [*before, *inside, result]
    extents = used([names.extent(a) for a in (*out, *extent_axes(expr))], code)
    size = product(names.extents(rest))
    sizes = {**({"columns": "columns"} if loop else {}), "size": "size", **{e: e for e in extents}}
    columns = product(names.extents(loop))
    launch = launcher(program, [size, columns if loop else "", *out_shape(program)], sizes)
    launch |= {"size": size, "columns": columns, "out": sequence(out_shape(program))}
    launch["sizes"] = (*launch["sizes"], *numbers.values())
    return {
        "name": program.name, "doc": program.doc, "pointers": used_pointers(program, code), "sizes": (*sizes, *numbers),
        "before": before, "inside": inside, "column": column, "result": result,
        "loop": loop_head(column, "columns", 1, divided(inside)),
        "launch": launch | {"operands": [p.removesuffix("_ptr") for p in used_pointers(program, code)]},
    }  # fmt: skip


def _looped(program: Pointwise) -> Axes:
    """The leading axes that some read lacks, while each read has all of them or none: one with a part would be read again."""
    loop: Axes = ()
    for axis in program.out[:-1]:
        longer = {*loop, axis}
        held = {len(longer & set(read.axes)) for read in program.reads}
        if held == {len(longer)} or not held <= {0, len(longer)}:
            break
        loop = (*loop, axis)
    return loop
