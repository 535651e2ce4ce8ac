"""Context of a matrix-product kernel with squares before or after its inner sum."""

from __future__ import annotations

from collections.abc import Mapping

from ...lowering.programs import Contraction, Read
from ..triton_axes import Group, Names, chains, decode, grouped, offset, plus, product, scaled, used
from .context import (
    KERNEL_NAMES,
    Context,
    autotune_key,
    decoded,
    launcher,
    loop_head,
    out_shape,
    parenthesized,
    pointers,
    step_index_of,
    tile_offset,
    tile_strides_of,
    tuple_code,
)


def contraction(definition: str, program: Contraction) -> Context:
    out = program.out
    a, b = (
        (program.a, program.b) if out[-1] in program.b.axes else (program.b, program.a)
    )  # the last axis across the tile
    steps = program.accumulate
    role: dict[str, str] = {axis: "k" for axis in program.sums} | {axis: "step" for axis in steps}
    for axis in out:
        role[axis] = {(True, False): "m", (False, True): "n", (True, True): "batch"}[axis in a.axes, axis in b.axes]
    program.require(set(a.axes) | set(b.axes) == set(role), "every axis must be kept, summed or accumulated")
    groups = chains([read.axes for read in program.all_reads] + [out], role)
    by_role: dict[str, list[Group]] = {}
    for group in groups:
        by_role.setdefault(role[group[0]], []).append(group)
    for what, most in (("m", 1), ("n", 1), ("k", 1), ("batch", 1)):
        found = by_role.get(what, [])
        program.require(len(found) <= most, f"axes {found} cannot be walked as one")
        program.require(bool(found) or what == "batch", f"no axis for the {what} side of a matrix product")
    (m,), (n,), (k,) = by_role["m"], by_role["n"], by_role["k"]
    (batch,) = by_role.get("batch", [None])
    names = Names(program, KERNEL_NAMES)
    size = {group: names.size(group) for group in groups}
    im, in_, ik = names.index(m), names.index(n), names.index(k)
    outer = names.index(batch) if batch else "part"
    step_groups = [group for group in groups if role[group[0]] == "step"]
    split = batch is None and (bool(step_groups) or not program.square_epilogue)
    split_k = split and not step_groups
    step_index = {group: names.index(group) for group in step_groups}
    origin = {m: f"{im}_start", n: f"{in_}_start"} | ({batch: outer} if batch else {})
    if split_k:
        origin[k] = f"{outer} * BLOCK_K"
    layout = {read: grouped(read.axes, groups) for read in program.all_reads}

    def start(read: Read) -> str:
        run, index = step_index_of(layout[read], step_groups, step_index)
        return plus(f"{read.tensor}_ptr", offset(run, {**origin, **index}, size))

    starts = {read: start(read) for read in program.all_reads}
    tile = {read: tile_offset(layout[read], {read_m: "[:, None]", read_k: "[None, :]"}, names, size)
            for read, read_m, read_k in ((a, m, k), (b, k, n))}  # fmt: skip
    value = {read: names.value(read) for read in (a, b)}
    squared = {read: f"{value[read]} * {value[read]}" if read.square else value[read] for read in (a, b)}
    advance = f"{ik}_step" if split_k else "BLOCK_K"
    strides = {read: [size[g] for g in layout[read][layout[read].index(k) + 1 :]] for read in (a, b)}
    all_steps = decode("index", step_groups, size, step_index)
    statements = decoded(step_groups, step_index, all_steps, list(starts.values()))
    epilogue = _epilogue(program, starts)
    out_layout = grouped(out, groups)
    out_start = plus("out_ptr", offset(out_layout, {g: i for g, i in origin.items() if g != k}, size))
    if batch is None and split:
        out_start = plus("out_ptr", scaled("part", [size[g] for g in out_layout]), out_start.removeprefix("out_ptr + "))
    out_tile = tile_offset(out_layout, {m: "[:, None]", n: "[None, :]"}, names, size)
    body = [
        *starts.values(),
        *tile.values(),
        *statements,
        out_start,
        out_tile,
        *(s for st in strides.values() for s in st),
    ]
    sizes = {
        size[g]: product(names.extents(g))
        for g in groups
        if size[g] in used(size.values(), [*body, size[m], size[n], size[k]])
    }
    sizes |= {"steps": product(f for g in step_groups for f in names.extents(g))} if step_groups else {}
    m_size, n_size = product(names.extents(m)), product(names.extents(n))
    tile_strides = tile_strides_of([(layout[a], (m, k)), (layout[b], (k, n)), (out_layout, (m, n))], names)
    k_size = product(names.extents(k))
    launch = launcher(program, [*out_shape(program), m_size, n_size, k_size], sizes)
    launch |= {
        "out": tuple_code(["parts", *out_shape(program)] if split else out_shape(program)),
        "m_size": parenthesized(m_size), "n_size": parenthesized(n_size),
        "strides": tile_strides, "batch": product(names.extents(batch)) if batch else "",
        "split_steps": sizes["steps"] if step_groups else f"triton.cdiv({k_size}, 16)",
        "precision": f"{a.tensor}, {b.tensor}" + (", squared=True" if a.square or b.square else ""),
    }  # fmt: skip
    return {
        "name": program.name, "doc": program.doc, "pointers": pointers(program), "sizes": tuple(sizes),
        "key": autotune_key([size[m], size[n], "COMPUTE", "PRECISION"]), "outer": outer,
        "m": im, "n": in_, "k": ik, "m_size": size[m], "n_size": size[n], "k_size": size[k],
        "a": value[a], "b": value[b], "a_value": squared[a], "b_value": squared[b],
        "a_tile": tile[a], "b_tile": tile[b], "a_start": starts[a], "b_start": starts[b],
        "a_advance": scaled(advance, strides[a]), "b_advance": scaled(advance, strides[b]),
        "loop": loop_head("step", "steps", 0 if split else None, bool(statements)) if step_groups else "", "decode": statements,
        "k_step": "tl.num_programs(0).to(tl.int64) * BLOCK_K" if split_k else "",
        "k_range": f"{outer} * BLOCK_K, {size[k]}, {ik}_step" if split_k else f"0, {size[k]}, BLOCK_K",
        "epilogue": epilogue, "split": split, "out_start": out_start, "out_tile": out_tile, "launch": launch,
        "needs_outer": bool(batch) or split,
    }  # fmt: skip


def _epilogue(program: Contraction, starts: Mapping[Read, str]) -> list[str]:
    value = "product" if program.accumulate else "total"
    result = f"{value} * {value}" if program.square_epilogue else value
    if program.weight is None:
        return (
            [f"total += {result}"]
            if program.accumulate
            else ["total = total * total"]
            if program.square_epilogue
            else []
        )
    program.require(bool(program.accumulate), "a weight needs axes to accumulate over")
    batch = {axis for axis in program.out if axis in program.a.axes and axis in program.b.axes}
    program.require(
        set(program.weight.axes) <= {*program.accumulate, *batch}, "a weight may carry accumulated and batch axes only"
    )
    return [f"weight = tl.load({starts[program.weight]}).to(COMPUTE)", f"total += weight * {result}"]
