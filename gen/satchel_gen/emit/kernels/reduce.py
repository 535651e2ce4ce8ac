"""Context of a reduction kernel: rows of steps against lanes of contiguous elements."""

from __future__ import annotations

from ...lowering.programs import Reduce
from ..aten_expr import sequence
from ..triton_axes import Names, chains, decode, grouped, offset, plus, product, scaled, used
from .context import (
    KERNEL_NAMES,
    Context,
    launcher,
    out_shape,
    parenthesized,
    pointers,
    step_index_of,
)


def reduce(definition: str, program: Reduce) -> Context:
    read, weight, out = program.read, program.weight, program.out
    inner_axes = program.inner if program.square or not program.outer else ()
    outer_axes = program.outer if inner_axes or program.square else (*program.outer, *program.inner)
    lane_axis = next(axis for axis in reversed(read.axes) if axis not in inner_axes)
    outer_axes = tuple(axis for axis in read.axes if axis in outer_axes)
    lane_kept = lane_axis in out
    role: dict[str, str] = {axis: "batch" for axis in out} | {axis: "step" for axis in outer_axes}
    role |= {axis: "inner" for axis in inner_axes} | {lane_axis: "lane"}
    if not outer_axes or set(outer_axes) == {lane_axis}:
        program.require(lane_kept or bool(outer_axes), "nothing is kept and nothing is summed")
    groups = chains([r.axes for r in program.all_reads] + [out], role)
    names = Names(program, KERNEL_NAMES)
    size = {group: names.size(group) for group in groups}
    index = {group: names.index(group) for group in groups}
    of = {what: [group for group in groups if role[group[0]] == what] for what in ("batch", "step", "inner", "lane")}
    for what in ("batch", "inner"):
        program.require(len(of[what]) <= 1, f"axes {of[what]} cannot be walked as one")
    lane = of["lane"][0]
    batch = of["batch"][0] if of["batch"] else None
    inner = of["inner"][0] if of["inner"] else None
    layout = grouped(read.axes, groups)
    stepped = bool(outer_axes)
    stepping = {group: index[group] for group in of["step"]}
    _, step_index = step_index_of(layout, of["step"], stepping)
    at = {lane: f"{index[lane]}[None, :]"} | {group: f"{code}[:, None]" for group, code in step_index.items()}
    at |= {batch: index[batch] if stepped else f"{index[batch]}[:, None]"} if batch else {}
    where = f"{read.tensor}_ptr + {offset(layout, at, size)}"
    pointer = f"{names.value(read)}_tile"
    body = []
    by_group = decode("step", of["step"], size, index, widen=False)
    if len(of["step"]) > 1:
        body += [by_group[group] for group in of["step"] if group in step_index and step_index[group] != "step"]
    body += [f"{pointer} = {where}"]
    part = "part * part" if program.square else "part"
    if weight is not None:
        program.require(bool(outer_axes) and lane_axis not in weight.axes, "a weight varies over what is summed")
        program.require(not set(weight.axes) & set(inner_axes), "a weight may not carry inner axes")
        _, weight_index = step_index_of(grouped(weight.axes, groups), of["step"], stepping)
        weight_index |= {batch: index[batch]} if batch else {}
        body += [f"weight = tl.load({weight.tensor}_ptr + {offset(grouped(weight.axes, groups), weight_index, size)}, "
                 "mask=step_inside, other=0).to(COMPUTE)"]  # fmt: skip
        part = f"weight[:, None] * {part}"
    out_layout = grouped(out, groups)
    if stepped and lane_kept:
        out_offset = plus(
            scaled("tl.program_id(2).to(tl.int64)", [size[g] for g in out_layout]),
            offset(out_layout, {lane: index[lane]} | ({batch: index[batch]} if batch else {}), size),
        )
    elif stepped:
        row = f"({index[batch]} * tl.num_programs(1) + tl.program_id(1))" if batch else "tl.program_id(1)"
        out_offset = f"{row} * tl.num_programs(2) + tl.program_id(2)"
    else:
        out_offset = offset(out_layout, at, size)
    advance = product([size[g] for g in layout[layout.index(inner) + 1 :]]) if inner else ""
    code = [
        *body,
        out_offset,
        advance,
        size[lane],
        size[inner] if inner else "",
        size[batch] if batch and not stepped else "",
    ]
    steps = product(f for g in of["step"] for f in names.extents(g))
    sizes = {size[g]: product(names.extents(g)) for g in groups if size[g] in used(size.values(), code)}
    sizes |= {"steps": "steps"} if stepped else {}
    shape = out_shape(program)
    batch_size = product(names.extents(batch)) if batch else "1"
    launch = launcher(program, [*shape, steps if stepped else "", batch_size, product(names.extents(lane))], sizes)
    first = batch_size if stepped else f"cdiv({batch_size}, REDUCE_ROWS)"
    launch |= {
        "lane_size": product(names.extents(lane)), "programs": f"lanes * {parenthesized(batch_size)}" if batch else "lanes",
        "grid": f"{first}, lanes, {'parts' if stepped else '1'}",
        "out": sequence(shape) if not stepped else sequence(["parts", *shape] if lane_kept else [*shape, "lanes", "parts"]),
        "result": "out" if not stepped else "out[0] if parts == 1 else out.sum(0)" if lane_kept else "out.sum((-2, -1))",
    }  # fmt: skip
    return {
        "name": program.name, "doc": program.doc, "pointers": pointers(program), "sizes": tuple(sizes),
        "batch": index[batch] if batch else "", "batch_size": size[batch] if batch else "", "lane": index[lane],
        "lane_size": size[lane], "steps": steps if stepped else "", "body": body, "pointer": pointer, "value": part,
        "inner": index[inner] if inner else "", "inner_size": size[inner] if inner else "", "advance": advance,
        "lane_kept": lane_kept, "out_offset": out_offset, "launch": launch,
    }  # fmt: skip
