"""Context of a kernel that sums the product of two Gram matrices, tile by tile."""

from __future__ import annotations

from ...lowering.programs import Gram, Read
from ..triton_axes import Names, chains, decode, grouped, offset, plus, product, scaled, used
from .context import (
    KERNEL_NAMES,
    Context,
    autotune_key,
    decoded,
    launcher,
    loop_head,
    out_shape,
    pointers,
    step_index_of,
    tile_strides_of,
)


def gram(definition: str, program: Gram) -> Context:
    a, b, out, steps = program.a, program.b, program.out, program.outer
    kept = {*out, *steps, program.rows}
    role: dict[str, str] = {axis: "batch" for axis in out} | {axis: "step" for axis in steps} | {program.rows: "row"}
    role |= {axis: read.tensor for read in (a, b) for axis in read.axes if axis not in kept}
    groups = chains([a.axes, b.axes, out], role)
    names = Names(program, KERNEL_NAMES)
    size = {group: names.size(group) for group in groups}
    (batch,) = [group for group in groups if role[group[0]] == "batch"]
    step_groups = [group for group in groups if role[group[0]] == "step"]
    step_index = {group: names.index(group) for group in step_groups}
    rows = (program.rows,)
    body: list[str] = []

    def side(read: Read) -> Context:
        layout = grouped(read.axes, groups)
        inner = [group for group in layout if role[group[0]] == read.tensor]
        program.require(len(inner) == 1, f"{read.tensor!r} must keep exactly one contracted axis, has {inner}")
        (k,) = inner
        _, index = step_index_of(layout, step_groups, step_index)
        base = {batch: names.index(batch), **index}
        stride = [size[g] for g in layout[layout.index(k) + 1 :]]
        row_stride = [size[g] for g in layout[layout.index(rows) + 1 :]]
        context = {
            "name": names.value(read), "size": size[k],
            "row_value": "rows * rows" if read.square else "rows",
            "column_value": "columns * columns" if read.square else "columns",
            "row_start": f"{read.tensor}_ptr + {offset(layout, {**base, rows: 'row_start'}, size)}",
            "column_start": f"{read.tensor}_ptr + {offset(layout, {**base, rows: 'column_start'}, size)}",
            "row_tile": plus(scaled("lane[:, None]", row_stride), scaled("k[None, :]", stride)),
            "column_tile": plus(scaled("k[:, None]", stride), scaled("lane[None, :]", row_stride)),
            "advance": scaled("BLOCK_K", stride),
        }  # fmt: skip
        body.extend(str(code) for code in context.values())
        return context

    sides = {"a": side(a), "b": side(b)}
    statements = decoded(step_groups, step_index, decode("index", step_groups, size, step_index), body)
    sizes = {
        size[g]: product(names.extents(g))
        for g in groups
        if size[g] in used(size.values(), [*body, *statements, size[rows]])
    }
    sizes |= {"steps": product(f for g in step_groups for f in names.extents(g))} if step_groups else {}
    strides = tile_strides_of([(grouped(read.axes, groups), (rows,)) for read in (a, b)], names)
    launch = launcher(program, [*out_shape(program), *strides], sizes)
    launch |= {
        "out": ", ".join(out_shape(program)), "batch": product(names.extents(batch)), "rows": names.extent(program.rows),
        "strides": strides, "precision": f"{a.tensor}, {b.tensor}" + (", squared=True" if a.square or b.square else ""),
    }  # fmt: skip
    return {
        "name": program.name, "doc": program.doc, "pointers": pointers(program), "sizes": tuple(sizes),
        "key": autotune_key(["BLOCK_M", "COMPUTE", "PRECISION"]), "batch": names.index(batch), "rows_size": size[rows],
        "loop": loop_head("step", "steps", None, bool(statements)) if step_groups else "for _ in range(1):",
        "decode": statements, "launch": launch, **sides,
    }  # fmt: skip
