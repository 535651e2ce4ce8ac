"""Programs to template contexts: every name, offset and statement of a kernel, printed before its template is rendered."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy

from ..lowering.programs import Axes, Contraction, Gram, Pointwise, Program, Read, Reduce, Row
from .triton_axes import Group, Names, chains, decode, grouped, offset, plus, product, scaled, used
from .triton_expr import DELTAS, Lines, TritonPrinter, hoist

Context = dict[str, Any]
KERNEL_NAMES = frozenset(
    [
        "out",
        "out_ptr",
        "start",
        "lane",
        "inside",
        "base",
        "element",
        "size",
        "columns",
        "column",
        "row",
        "rows",
        "row_inside",
        "step",
        "steps",
        "step_start",
        "part",
        "parts",
        "total",
        "product",
        "value",
        "k",
        "k_inside",
        "first",
    ]
)


def _launch(program: Program, code: Iterable[str], sizes: Mapping[str, str] | None = None) -> Context:
    """What all launchers share: the signature, contiguous operands, and the extents that `code` and `sizes` use."""
    names = Names(program)
    tensors = program.tensors
    layout: dict[str, Axes] = {}
    for read in program.all_reads:
        layout.setdefault(read.tensor, read.axes)
    needed = used(
        (names.extent(axis) for tensor in tensors for axis in layout[tensor]), [*code, *(sizes or {}).values()]
    )
    extents: list[str] = []
    found: set[str] = set()
    for tensor in tensors:
        new = [name if name in needed and name not in found else "_" for name in names.extents(layout[tensor])]
        wanted = [name for name in new if name != "_"]
        if len(wanted) == 1:
            extents.append(f"{wanted[0]} = {tensor}.shape[{new.index(wanted[0])}]")
        elif wanted:
            extents.append(f"{', '.join(new)} = {tensor}.shape")
        found |= set(wanted)
    shapes = ", ".join(f"{tensor} [{', '.join(names.extents(layout[tensor]))}]" for tensor in tensors)
    return {
        "signature": ", ".join(f"{tensor}: Tensor" for tensor in tensors),
        "shapes": f"{shapes} -> [{', '.join(_out_shape(program))}].",
        "contiguous": f"{', '.join(tensors)} = {', '.join(f'{tensor}.contiguous()' for tensor in tensors)}",
        "extents": extents,
        "tensors": tensors,
        "first": program.all_reads[0].tensor,
        "sizes": tuple((sizes or {}).values()),
    }


def _out_shape(program: Program) -> list[str]:
    extents = Names(program).extents(program.out)
    merged = extents[: program.columns]
    head = [product(merged)] if len(merged) > 0 else []
    return head + extents[program.columns :]


def _tuple(parts: Sequence[str]) -> str:
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _pointers(program: Program) -> list[str]:
    return [f"{tensor}_ptr" for tensor in program.tensors]


def _delta_axes(expr: sympy.Expr, axes: Axes) -> tuple[str, ...]:
    """The axes whose index the expression compares."""
    deltas = [atom for atom in expr.atoms(sympy.Function) if atom.func.__name__ in DELTAS]
    named = {str(getattr(argument, "name", argument)) for delta in deltas for argument in delta.args}
    return tuple(axis for axis in axes if axis in named)


def _extent_axes(expr: sympy.Expr) -> list[str]:
    return [
        str(getattr(e.args[0], "name", e.args[0])) for e in expr.atoms(sympy.Function) if e.func.__name__ == "Extent"
    ]


def _used_in(read: Read, expr: sympy.Expr) -> bool:
    return read.symbol in {str(getattr(symbol, "name", symbol)) for symbol in expr.free_symbols}


# Pointwise


def pointwise(definition: str, program: Pointwise) -> Context:
    names = Names(program, KERNEL_NAMES)
    out, expr = program.out, sympy.sympify(program.expr)
    loop = tuple(itertools.takewhile(lambda axis: any(axis not in read.axes for read in program.reads), out))
    loop = loop if len(loop) < len(out) else out[:-1]
    rest = out[len(loop) :]
    axes = {axis: names.index((axis,)) for axis in out}
    indexed = set(_delta_axes(expr, out))
    loads: dict[bool, list[str]] = {False: [], True: []}
    for read in program.reads:
        if not _used_in(read, expr):
            continue
        outer = [axis for axis in read.axes if axis in loop]
        inner = tuple(axis for axis in read.axes if axis not in loop)
        program.require(read.axes == (*outer, *inner), f"{read.tensor!r} must have its axes in the order of {out}")
        if read.axes == out and loop:
            where = "base + lane"
        elif inner == rest:
            where = plus(_flat(read.axes, outer, axes, names), "start + lane")
        else:
            where = _flat(read.axes, read.axes, axes, names)
            indexed |= set(inner)
        indexed |= set(outer) if read.axes != out else set()
        value = names.value(read)
        loads[bool(outer)].append(f"{value} = tl.load({read.tensor}_ptr + {where}, mask=inside, other=0).to(COMPUTE)")
        loads[bool(outer)] += [f"{value} = {value} * {value}"] if read.square else []
    single = {(axis,): names.extent(axis) for axis in out}
    index_names = {(axis,): axes[axis] for axis in out}
    decode_rest = decode("element", [(a,) for a in rest], single, index_names, widen=False)
    decode_loop = decode("index", [(a,) for a in loop], single, index_names)
    column = (axes[loop[0]] if len(loop) == 1 else "column") if loop else ""
    before = [decode_rest[(axis,)] for axis in rest if axis in indexed]
    before = ["element = start + lane", *before] if before else []
    if len(rest) == 1 and before:
        before = [f"{axes[rest[0]]} = start + lane"]
    inside = [decode_loop[(axis,)] for axis in loop if axis in indexed] if len(loop) > 1 else []
    inside = ["column = tl.cast(index, tl.int64)", *inside] if inside else []
    moving = frozenset({read.symbol for read in program.reads if set(read.axes) & set(loop)} | set(loop))
    lines = Lines(set(KERNEL_NAMES) | {names.value(read) for read in program.reads} | set(axes.values()))
    printer = _printer(definition, program, names, axes, lines)
    if loop:
        expr = hoist(expr, moving, _namer(printer, lines))
    before += loads[False] + lines.statements
    lines.statements = []
    result = printer.statements(expr)
    inside += loads[True] + lines.statements
    if not loop:
        before += loads[True] + lines.statements
    code = [*before, *inside, result]
    extents = used([names.extent(a) for a in (*out, *_extent_axes(expr))], code)
    size = product(names.extents(rest))
    sizes = {**({"columns": "columns"} if loop else {}), "size": "size", **{e: e for e in extents}}
    columns = product(names.extents(loop))
    launch = _launch(program, [size, columns if loop else "", *_out_shape(program)], sizes)
    launch |= {"size": size, "columns": columns, "out": _tuple(_out_shape(program))}
    return {
        "name": program.name, "doc": program.doc, "pointers": _used_pointers(program, code), "sizes": tuple(sizes),
        "before": before, "inside": inside, "column": column, "result": result,
        "loop": _range(column, "columns", 1, any("index" in line for line in inside)),
        "launch": launch | {"operands": [p.removesuffix("_ptr") for p in _used_pointers(program, code)]},
    }  # fmt: skip


def _flat(layout: Axes, indexed: Iterable[str], axes: Mapping[str, str], names: Names) -> str:
    sizes = {(axis,): names.extent(axis) for axis in layout}
    return offset([(axis,) for axis in layout], {(axis,): axes[axis] for axis in indexed}, sizes)


def _used_pointers(program: Program, code: Iterable[str]) -> list[str]:
    return list(used(_pointers(program), code))


def _printer(
    definition: str,
    program: Pointwise | Row,
    names: Names,
    axes: Mapping[str, str],
    lines: Lines,
    stages: Iterable[str] = (),
) -> TritonPrinter:
    values = {read.symbol: names.value(read) for read in program.reads} | {stage: stage for stage in stages}
    extents = {axis: names.extent(axis) for axis in {*program.out, *(a for read in program.reads for a in read.axes)}}
    return TritonPrinter(definition, values, axes, extents, lines)


def _namer(printer: TritonPrinter, lines: Lines) -> Callable[[sympy.Expr], str]:
    """Names a part that is computed once before a loop: `factor`, `factor_2`, …"""

    def name(expr: sympy.Expr) -> str:
        symbol = lines.fresh("factor")
        printer.values[symbol] = printer.statements(expr, symbol)
        return symbol

    return name


# Contraction


def contraction(definition: str, program: Contraction) -> Context:
    a, b, weight, out = program.a, program.b, program.weight, program.out
    steps = program.accumulate
    role: dict[str, object] = {axis: "k" for axis in program.sums} | {axis: "step" for axis in steps}
    for axis in out:
        role[axis] = {(True, False): "m", (False, True): "n", (True, True): "batch"}[axis in a.axes, axis in b.axes]
    program.require(set(a.axes) | set(b.axes) == set(role), "every axis must be kept, summed or accumulated")
    groups = chains([read.axes for read in program.all_reads] + [out], role)
    by_role: dict[object, list[Group]] = {}
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
        run, index = _run(layout[read], step_groups, step_index)
        return plus(f"{read.tensor}_ptr", offset(run, {**origin, **index}, size))

    starts = {read: start(read) for read in program.all_reads}
    tile = {read: _tile(layout[read], {read_m: "[:, None]", read_k: "[None, :]"}, names, size)
            for read, read_m, read_k in ((a, m, k), (b, k, n))}  # fmt: skip
    value = {read: names.value(read) for read in (a, b)}
    squared = {read: f"{value[read]} * {value[read]}" if read.square else value[read] for read in (a, b)}
    advance = f"{ik}_step" if split_k else "BLOCK_K"
    strides = {read: [size[g] for g in layout[read][layout[read].index(k) + 1 :]] for read in (a, b)}
    all_steps = decode("index", step_groups, size, step_index)
    decoded = used(step_index.values(), list(starts.values()))
    statements = (
        [all_steps[group] for group in step_groups if step_index[group] in decoded] if len(step_groups) > 1 else []
    )
    epilogue = _epilogue(program, starts)
    out_layout = grouped(out, groups)
    out_start = plus("out_ptr", offset(out_layout, {g: i for g, i in origin.items() if g != k}, size))
    if batch is None and split:
        out_start = plus("out_ptr", scaled("part", [size[g] for g in out_layout]), out_start.removeprefix("out_ptr + "))
    out_tile = _tile(out_layout, {m: "[:, None]", n: "[None, :]"}, names, size)
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
    tile_strides = _strides([(layout[a], (m, k)), (layout[b], (k, n)), (out_layout, (m, n))], names)
    k_size = product(names.extents(k))
    launch = _launch(program, [*_out_shape(program), m_size, n_size, k_size], sizes)
    launch |= {
        "out": ", ".join(_out_shape(program)), "m_size": _factor(m_size), "n_size": _factor(n_size),
        "strides": tile_strides, "batch": product(names.extents(batch)) if batch else "",
        "split_steps": sizes["steps"] if step_groups else f"triton.cdiv({k_size}, 16)",
        "precision": f"{a.tensor}, {b.tensor}" + (", squared=True" if a.square or b.square else ""),
    }  # fmt: skip
    return {
        "name": program.name, "doc": program.doc, "pointers": _pointers(program), "sizes": tuple(sizes),
        "key": _key([size[m], size[n], "COMPUTE", "PRECISION"]), "outer": outer,
        "m": im, "n": in_, "k": ik, "m_size": size[m], "n_size": size[n], "k_size": size[k],
        "a": value[a], "b": value[b], "a_value": squared[a], "b_value": squared[b],
        "a_tile": tile[a], "b_tile": tile[b], "a_start": starts[a], "b_start": starts[b],
        "a_advance": scaled(advance, strides[a]), "b_advance": scaled(advance, strides[b]),
        "loop": _range("step", "steps", 0 if split else None, bool(statements)) if step_groups else "", "decode": statements,
        "k_step": "tl.num_programs(0).to(tl.int64) * BLOCK_K" if split_k else "",
        "k_range": f"{outer} * BLOCK_K, {size[k]}, {ik}_step" if split_k else f"0, {size[k]}, BLOCK_K",
        "epilogue": epilogue, "split": split, "out_start": out_start, "out_tile": out_tile, "launch": launch,
        "needs_outer": bool(batch) or split,
    }  # fmt: skip


def _range(index: str, count: str, split: int | None, divided: bool) -> str:
    """The head of a loop over `count` in 64 bits, or in 32 where the index is divided first; split over a grid axis."""
    if divided:
        return f"for index in range(tl.program_id({split}), {count}, tl.num_programs({split})):" if split is not None else (
            f"for index in range({count}):"
        )
    if split is None:
        return f"for {index} in range(tl.cast(0, tl.int64), {count}):"
    return f"for {index} in range(tl.program_id({split}).to(tl.int64), {count}, tl.num_programs({split})):"


def _decoded(
    groups: Sequence[Group], index: Mapping[Group, str], statements: Mapping[Group, str], code: Iterable[str]
) -> list[str]:
    """The statements that the loop over steps begins with, where more than the flat index is needed."""
    if len(groups) < 2:
        return []
    found = used(["step", *index.values()], code)
    lines = [statements[group] for group in groups if index[group] in found]
    return ["step = tl.cast(index, tl.int64)", *lines] if "step" in found and lines else lines


def _factor(code: str) -> str:
    return f"({code})" if " " in code else code


def _key(names: Iterable[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


def _run(
    layout: tuple[Group, ...], steps: list[Group], index: Mapping[Group, str]
) -> tuple[tuple[Group, ...], dict[Group, str]]:
    """How a tensor is indexed by the steps: by `step` itself where it carries all of them side by side, else by each."""
    if not steps:
        return layout, {}
    if len(steps) == 1:
        return layout, {steps[0]: "step"} if steps[0] in layout else {}
    run = tuple(group for group in layout if group in index)
    at = layout.index(run[0]) if run else 0
    if run == tuple(steps) and layout[at : at + len(run)] == run:
        return layout, {run[-1]: "step"}
    return layout, {group: index[group] for group in run}


def _tile(layout: tuple[Group, ...], broadcast: Mapping[Group, str], names: Names, size: Mapping[Group, str]) -> str:
    return offset(
        layout, {group: f"{names.index(group)}{at}" for group, at in broadcast.items() if group in layout}, size
    )


def _strides(tiles: Iterable[tuple[tuple[Group, ...], tuple[Group, ...]]], names: Names) -> list[str]:
    """The strides inside tiles, but for 1 and repetitions, as the launcher's products of extents."""
    found = []
    for layout, tiled in tiles:
        for group in tiled:
            after = [extent for g in layout[layout.index(group) + 1 :] for extent in names.extents(g)]
            found.append(product(after))
    return [stride for stride in dict.fromkeys(found) if stride != "1"] or ["1"]


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
    program.require(set(program.weight.axes) <= set(program.accumulate), "a weight may carry accumulated axes only")
    return [f"weight = tl.load({starts[program.weight]}).to(COMPUTE)", f"total += weight * {result}"]


# Gram


def gram(definition: str, program: Gram) -> Context:
    a, b, out, steps = program.a, program.b, program.out, program.outer
    kept = {*out, *steps, program.rows}
    role: dict[str, object] = {axis: "batch" for axis in out} | {axis: "step" for axis in steps} | {program.rows: "row"}
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
        _, index = _run(layout, step_groups, step_index)
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
    decoded = decode("step", step_groups, size, step_index)
    statements = (
        [decoded[g] for g in step_groups if step_index[g] in used(step_index.values(), body)]
        if len(step_groups) > 1
        else []
    )
    sizes = {
        size[g]: product(names.extents(g))
        for g in groups
        if size[g] in used(size.values(), [*body, *statements, size[rows]])
    }
    sizes |= {"steps": product(f for g in step_groups for f in names.extents(g))} if step_groups else {}
    strides = _strides([(grouped(read.axes, groups), (rows,)) for read in (a, b)], names)
    launch = _launch(program, [*_out_shape(program), *strides], sizes)
    launch |= {
        "out": ", ".join(_out_shape(program)), "batch": product(names.extents(batch)), "rows": names.extent(program.rows),
        "strides": strides, "precision": f"{a.tensor}, {b.tensor}" + (", squared=True" if a.square or b.square else ""),
    }  # fmt: skip
    return {
        "name": program.name, "doc": program.doc, "pointers": _pointers(program), "sizes": tuple(sizes),
        "key": _key(["BLOCK_M", "COMPUTE", "PRECISION"]), "batch": names.index(batch), "rows_size": size[rows],
        "loop": _range("step", "steps", None, bool(statements)) if step_groups else "for _ in range(1):", "decode": statements, "launch": launch, **sides,
    }  # fmt: skip


# Reduce


def reduce(definition: str, program: Reduce) -> Context:
    read, weight, out = program.read, program.weight, program.out
    inner_axes = program.inner if program.square or not program.outer else ()
    outer_axes = program.outer if inner_axes or program.square else (*program.outer, *program.inner)
    lane_axis = next(axis for axis in reversed(read.axes) if axis not in inner_axes)
    outer_axes = tuple(axis for axis in read.axes if axis in outer_axes)
    lane_kept = lane_axis in out
    role: dict[str, object] = {axis: "batch" for axis in out} | {axis: "step" for axis in outer_axes}
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
    _, step_index = _run(layout, of["step"], index)
    at = {lane: f"{index[lane]}[None, :]"} | {group: f"{code}[:, None]" for group, code in step_index.items()}
    at |= {batch: index[batch] if stepped else f"{index[batch]}[:, None]"} if batch else {}
    where = f"{read.tensor}_ptr + {offset(layout, at, size)}"
    pointer = f"{names.value(read)}_tile"
    body = []
    decoded = decode("step", of["step"], size, index)
    if len(of["step"]) > 1:
        body += [decoded[group] for group in of["step"] if group in step_index and step_index[group] != "step"]
    body += [f"{pointer} = {where}"]
    part = "part * part" if program.square else "part"
    if weight is not None:
        program.require(set(weight.axes) <= set(outer_axes) - {lane_axis}, "a weight may carry summed axes only")
        _, weight_index = _run(grouped(weight.axes, groups), of["step"], index)
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
    shape = _out_shape(program)
    batch_size = product(names.extents(batch)) if batch else "1"
    launch = _launch(program, [*shape, steps if stepped else "", batch_size, product(names.extents(lane))], sizes)
    first = batch_size if stepped else f"triton.cdiv({batch_size}, REDUCE_ROWS)"
    launch |= {
        "lane_size": product(names.extents(lane)), "programs": f"lanes * {_factor(batch_size)}" if batch else "lanes",
        "grid": f"{first}, lanes, {'parts' if stepped else '1'}",
        "out": _tuple(shape) if not stepped else _tuple(["parts", *shape] if lane_kept else [*shape, "lanes", "parts"]),
        "result": "out" if not stepped else "out[0] if parts == 1 else out.sum(0)" if lane_kept else "out.sum((-2, -1))",
    }  # fmt: skip
    return {
        "name": program.name, "doc": program.doc, "pointers": _pointers(program), "sizes": tuple(sizes),
        "batch": index[batch] if batch else "", "batch_size": size[batch] if batch else "", "lane": index[lane],
        "lane_size": size[lane], "steps": steps if stepped else "", "body": body, "pointer": pointer, "value": part,
        "inner": index[inner] if inner else "", "inner_size": size[inner] if inner else "", "advance": advance,
        "lane_kept": lane_kept, "out_offset": out_offset, "launch": launch,
    }  # fmt: skip


# Row


def row(definition: str, program: Row) -> Context:
    names = Names(program, KERNEL_NAMES)
    first, k, out = program.reads[0], program.row, program.out
    row_axes = tuple(axis for axis in first.axes if axis != k)
    columns = tuple(axis for axis in out if axis not in first.axes)
    axes = {axis: names.index((axis,)) for axis in (*out, k)}
    single = {(axis,): names.extent(axis) for axis in (*out, k)}
    index_names = {(axis,): axes[axis] for axis in (*out, k)}
    expressions = [stage.expr for stage in program.stages] + [program.expr]
    indexed = {axis for expr in expressions for axis in _delta_axes(expr, (*out, k))}

    def where(layout: Axes) -> str:
        if layout == row_axes:
            return "row"
        if len(columns) > 1 and layout[: len(columns)] == columns:
            rest = layout[len(columns) :]
            return plus(scaled("column", names.extents(rest)), where(rest))
        indexed.update(axis for axis in layout if axis != k)
        return _flat(layout, layout, axes, names)

    def load(read: Read, mask: str) -> list[str]:
        value = names.value(read)
        lines = [f"{value} = tl.load({read.tensor}_ptr + {where(read.axes)}, mask={mask}, other=0)"]
        return [lines[0] + ("" if _compared_only(read, expressions) else ".to(COMPUTE)")] + (
            [f"{value} = {value} * {value}"] if read.square else []
        )

    in_use = [read for read in program.reads if any(_used_in(read, expr) for expr in expressions)]
    per_tile = [read for read in in_use if k in read.axes]
    per_column = [read for read in in_use if k not in read.axes and set(read.axes) & set(columns)]
    per_row = [read for read in in_use if read not in per_tile and read not in per_column]
    out_offset = where(out)
    stage_names = [stage.name for stage in program.stages]
    lines = Lines(
        set(KERNEL_NAMES) | set(axes.values()) | set(stage_names) | {names.value(read) for read in program.reads}
    )
    printer = _printer(definition, program, names, axes, lines, stage_names)

    def tile(expr: sympy.Expr) -> tuple[list[str], str]:
        lines.statements = [line for read in per_tile if _used_in(read, expr) for line in load(read, "inside")]
        result = printer.statements(expr)
        return lines.statements, result

    before = [line for read in per_row for line in load(read, "row_inside")]
    stages: list[Context] = []
    parts: dict[str, sympy.Expr] = {}
    for stage in program.stages:
        loops = _stage(stage.name, stage.kind, *tile(_replaced(stage.expr, parts)), lines)
        if stage.kind == "logsumexp":
            peak, tail = loops[0]["name"], f"{stage.name}_tail"
            parts[stage.name] = sympy.Symbol(peak) + sympy.Symbol(tail)
            printer.values |= {peak: peak, tail: tail}
        stages += loops
    lines.statements = [line for read in per_column for line in load(read, "row_inside")]
    tiled = frozenset({read.symbol for read in per_tile} | {k})
    expr = hoist(_replaced(program.expr, parts), tiled, _namer(printer, lines))
    column_lines = lines.statements
    statements, result = tile(expr)
    decode_rows = decode("row", [(a,) for a in row_axes], single, index_names)
    before = [decode_rows[(axis,)] for axis in row_axes if axis in indexed] + before
    if columns and len(columns) > 1:
        decode_columns = decode("index", [(a,) for a in columns], single, index_names)
        decoded = [decode_columns[(axis,)] for axis in columns if axis in indexed]
        column_lines = (["column = tl.cast(index, tl.int64)", *decoded] if decoded else []) + column_lines
    elif not columns:
        before_out, column_lines = column_lines, []
        if before_out:
            stages[-1]["after"] = [*stages[-1]["after"], *before_out]
    code = [*before, *column_lines, *statements, result, out_offset, names.extent(k)]
    code += [line for stage in stages for line in (*stage["statements"], stage["reduced"], *stage["after"])]
    extents = used([names.extent(axis) for axis in (*first.axes, *out)], code)
    sizes = {**({"columns": "columns"} if columns else {}), "rows": "rows", **{extent: extent for extent in extents}}
    rows, count = product(names.extents(row_axes)), product(names.extents(columns))
    launch = _launch(program, [rows, count if columns else "", *_out_shape(program)], sizes)
    launch |= {"rows": rows, "columns": count, "out": _tuple(_out_shape(program)), "floating": program.tensors}
    return {
        "name": program.name, "doc": program.doc, "pointers": _pointers(program), "sizes": tuple(sizes), "k": axes[k],
        "row_size": names.extent(k), "before": before, "stages": stages, "per_column": column_lines,
        "column": (axes[columns[0]] if len(columns) == 1 else "column") if columns else "",
        "statements": statements, "result": result, "out_offset": out_offset, "launch": launch,
        "loop": _range(axes[columns[0]] if len(columns) == 1 else "column", "columns", 1, "index" in " ".join(column_lines))
        if columns
        else "",
    }  # fmt: skip


def _replaced(expr: sympy.Expr, parts: Mapping[str, sympy.Expr]) -> sympy.Expr:
    """A logsumexp as maximum plus tail: (f - max) - tail keeps the digits that f - (max + tail) loses."""
    expr = sympy.sympify(expr)
    return expr.xreplace({symbol: parts[symbol.name] for symbol in expr.free_symbols if symbol.name in parts})


def _compared_only(read: Read, expressions: Iterable[sympy.Expr]) -> bool:
    """Whether a tensor holds indices: it occurs in deltas and nowhere else."""
    bare = [
        expr.replace(lambda e: getattr(e.func, "__name__", "") in DELTAS, lambda e: sympy.Integer(1))
        for expr in expressions
    ]
    return not any(_used_in(read, expr) for expr in bare)


def _stage(name: str, kind: str, statements: list[str], value: str, lines: Lines) -> list[Context]:
    """The loops of one reduction over the row axis; a logsumexp is a maximum, then a sum of shifted exponentials."""
    greatest = {"initial": 'float("-inf")', "statements": statements, "after": []}
    highest = 'tl.max(tl.where(inside, {0}, float("-inf")), axis=0, keep_dims=True)'
    if kind == "max":
        return [greatest | {"name": name, "reduced": f"tl.maximum({name}, {highest.format(value)})"}]
    if kind == "sum":
        update = f"{name} + tl.sum(tl.where(inside, {value}, 0.0), axis=0, keep_dims=True)"
        return [{"name": name, "initial": "0.0", "statements": statements, "reduced": update, "after": []}]
    peak, mass = lines.fresh(f"{name}_max"), lines.fresh(f"{name}_sum")
    shifted = f"tl.exp({value} - {peak})" if value.isidentifier() else f"tl.exp(({value}) - {peak})"
    return [
        greatest | {"name": peak, "reduced": f"tl.maximum({peak}, {highest.format(value)})"},
        {
            "name": mass, "initial": "0.0", "statements": statements, "after": [f"{name}_tail = tl.log({mass})"],
            "reduced": f"{mass} + tl.sum(tl.where(inside, {shifted}, 0.0), axis=0, keep_dims=True)",
        },
    ]  # fmt: skip
