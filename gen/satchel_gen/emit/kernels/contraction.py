"""Context of a matrix-product kernel with squares before or after its inner sum.

Where an operand is read at affine positions (the window of a convolution), the same product walks over them: flat indices of
the tile are taken apart, and the position of every element is computed, never stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from sympy import Expr

from ...lowering.programs import Contraction, Read
from ...notation import Option
from ..aten_expr import sequence
from ..triton_axes import Group, Names, chains, decode, grouped, offset, plus, product, scaled, used
from .context import (
    KERNEL_NAMES,
    Context,
    autotune_key,
    decoded,
    launcher,
    out_shape,
    parenthesized,
    pointers,
    step_index_of,
    tile_strides_of,
)

SIDES = ("m", "n", "k")


@dataclass(frozen=True)
class Side:
    """The axes along one side of a tile, walked as one flat index."""

    groups: tuple[Group, ...]
    index: str
    size: str


@dataclass(frozen=True)
class Plan:
    """The sides, sizes and names of one program."""

    program: Contraction
    a: Read
    b: Read
    names: Names
    groups: list[Group]
    role: Mapping[str, str]
    sides: Mapping[str, Side]
    size: Mapping[Group, str]

    @property
    def windowed(self) -> bool:
        return any(read.windows for read in (self.a, self.b))

    def of(self, role: str) -> list[Group]:
        return [group for group in self.groups if self.role[group[0]] == role]

    def layout(self, read: Read) -> tuple[Group, ...]:
        """A tensor's axes as groups; axes with a window are groups of their own."""
        return (*grouped(read.plain, self.groups), *((w.axis.name,) for w in read.windows))

    def tile(self, layout: tuple[Group, ...], broadcast: Mapping[str, str]) -> str:
        """The offset inside a tile: by the flat index of a side that lies in memory as it is walked, else axis by axis."""
        terms = []
        for role, at in broadcast.items():
            side = self.sides[role]
            run = tuple(group for group in layout if group in side.groups)
            first = layout.index(run[0]) if run else 0
            if run and run == side.groups == layout[first : first + len(run)]:
                terms.append(scaled(f"{side.index}{at}", [self.size[g] for g in layout[first + len(run) :]]))
                continue
            index = {group: f"{self.names.index(group)}{at}" for group in run}
            terms.append(offset(layout, index, self.size))
        return plus(*terms)


def contraction(definition: str, program: Contraction) -> Context:
    plan = _planned(program)
    a, b, names, size, sides, out = plan.a, plan.b, plan.names, plan.size, plan.sides, program.out
    m, n, k = (sides[role] for role in SIDES)
    step_groups, batch = plan.of("step"), next(iter(plan.of("batch")), None)
    split_k = batch is None and not step_groups and not program.square_epilogue
    split = split_k or bool(step_groups)
    outer = names.index(batch) if batch else "part"
    step_index = {group: names.index(group) for group in step_groups}
    origin = {batch: outer} if batch else {}
    if not plan.windowed:
        origin |= {m.groups[0]: f"{m.index}_start", n.groups[0]: f"{n.index}_start"}
        origin |= {k.groups[0]: "part * BLOCK_K"} if split_k else {}
    layout = {read: plan.layout(read) for read in program.all_reads}

    def start(read: Read) -> str:
        run, index = step_index_of(layout[read], step_groups, step_index)
        return plus(f"{read.tensor}_ptr", offset(run, {**origin, **index}, size))

    starts = {read: start(read) for read in program.all_reads}
    all_steps = decode("index", step_groups, size, step_index)
    statements = decoded(step_groups, step_index, all_steps, list(starts.values()))
    out_layout = grouped(out, plan.groups)
    out_start, out_tile = _result(plan, out_layout, origin, batch, split)
    advance = f"{k.index}_step" if split_k else "BLOCK_K"
    loads = _loads(plan, starts, advance)
    body = [*starts.values(), *loads["head"], *loads["loop"], *statements, out_start, out_tile, m.size, n.size, k.size]
    body += [size[batch]] if batch and split else []
    fixed = [
        names.extent(getattr(w, kind).name) for r in (a, b) for w in r.windows for kind in ("axis", "place", "tap")
    ]
    steps = product(f for g in step_groups for f in names.extents(g))
    counts = ({"steps": steps} if step_groups else {}) | ({"tiles": "tiles"} if program.within else {})
    found = {size[g]: product(names.extents(g)) for g in size if size[g] in used(size.values(), body)}
    sizes = {name: code for name, code in found.items() if name not in fixed} | counts
    sizes |= {name: code for name, code in found.items() if name in fixed}
    extents = {role: product(f for g in side.groups for f in names.extents(g)) for role, side in sides.items()}
    geometry = {f"{names.option(option)}: tl.constexpr": str(option) for option in program.options}
    checked = _spans(plan) if plan.windowed else tile_strides_of(
        [(layout[a], (m.groups[0], k.groups[0])), (layout[b], (k.groups[0], n.groups[0])), (out_layout, (m.groups[0], n.groups[0]))],
        names,
    )  # fmt: skip
    batches = product(names.extents(batch)) if batch else ""
    launch = launcher(program, [*out_shape(program), *extents.values(), *checked], sizes)
    launch |= {
        "out": sequence([*(["parts"] if split else []), *out_shape(program), *(["tiles"] if program.within else [])]),
        "m_size": extents["m"], "n_size": extents["n"], "within": program.within,
        "check": f"check_{'spans' if plan.windowed else 'strides'}({', '.join(checked)})", "batch": batches,
        "grid": f"parts * {parenthesized(batches)}" if batch and split else batches if batch else "parts" if split else "1",
        "split_steps": steps if step_groups else f"cdiv({extents['k']}, 16)",
        "precision": f"{a.tensor}, {b.tensor}" + (", squared=True" if a.square or b.square else ""),
        "sizes": (*sizes.values(), *geometry.values()),
        "reduced": "out[0] if parts == 1 else out.sum(0)" if split else "out",
    }  # fmt: skip
    if program.within:
        launch["reduced"] = "out.sum((0, -1))" if split else "out.sum(-1)"
    parameters = [f"{name}: tl.constexpr" if name in fixed else name for name in sizes]
    key = [size[g] for role in ("m", "n", "k" if plan.windowed else "") if role for g in sides[role].groups]
    outer_lines = [f"{outer} = tl.program_id(0).to(tl.int64)"] if batch or split else []
    if batch and split:
        outer_lines = [
            f"{outer} = (tl.program_id(0) % {size[batch]}).to(tl.int64)",
            f"part = tl.program_id(0) // {size[batch]}",
        ]
    return {
        "name": program.name, "doc": program.doc, "pointers": pointers(program),
        "sizes": (*parameters, *geometry), "key": autotune_key([*key, "COMPUTE", "PRECISION"]),
        "outer": outer_lines, "m": m.index, "n": n.index, "k": k.index, "k_size": k.size,
        "a": names.value(a), "b": names.value(b), "head": loads["head"], "loop_body": loads["loop"], "after": loads["after"],
        "factors": loads["factors"],
        "a_start": starts[a], "b_start": starts[b],
        "loop": _loop(plan, batch, split, bool(statements)) if step_groups else "", "decode": statements,
        "k_step": "tl.num_programs(0).to(tl.int64) * BLOCK_K" if split_k else "",
        "k_range": f"part * BLOCK_K, {k.size}, {k.index}_step" if split_k else f"0, {k.size}, BLOCK_K",
        "epilogue": _epilogue(program, starts), "split": split, "out_start": out_start, "out_tile": out_tile,
        "within": program.within, "launch": launch,
    }  # fmt: skip


def _planned(program: Contraction) -> Plan:
    """Who walks over what: an axis of the result lies along the operand that reads it; one that both read is a batch."""
    kept = (*program.out, *program.within)
    a, b = program.sides
    role: dict[str, str] = {axis: "k" for axis in program.sums} | {axis: "step" for axis in program.accumulate}
    for axis in kept:
        role[axis] = {(True, False): "m", (False, True): "n", (True, True): "batch"}[axis in a.walked, axis in b.walked]
    program.require(set(a.walked) | set(b.walked) == set(role), "every axis must be kept, summed or accumulated")
    windowed = bool(a.windows or b.windows)
    tensors = [read.axes for read in program.all_reads] + [program.out]
    order = [*program.out, *program.accumulate, *(axis for axis in (*a.walked, *b.walked) if axis not in program.out)]
    single: list[Group] = [(axis,) for axis in dict.fromkeys(order)]
    groups = single if windowed else chains(tensors, role)
    names = Names(program, KERNEL_NAMES)
    size = {group: names.size(group) for group in groups}
    size |= {(w.axis.name,): names.extent(w.axis.name) for read in (a, b) for w in read.windows}
    sides = {}
    for what in (*SIDES, "batch"):
        found = tuple(group for group in groups if role[group[0]] == what)
        program.require(len(found) <= 1 or (windowed and what != "batch"), f"axes {found} cannot be walked as one")
        program.require(bool(found) or what == "batch", f"no axis for the {what} side of a matrix product")
        if what != "batch":
            sides[what] = Side(found, names.index(tuple(a for g in found for a in g)), product(size[g] for g in found))
    return Plan(program, a, b, names, groups, role, sides, size)


def _loads(plan: Plan, starts: Mapping[Read, str], advance: str) -> dict[str, list[str]]:
    """Statements before the sums (`head`), before the inner loop (`before`) and in it (`loop`, `after`), and the factors."""
    m, n, k = (plan.sides[role] for role in SIDES)
    value = {read: plan.names.value(read) for read in (plan.a, plan.b)}
    sides = {plan.a: {"m": "[:, None]", "k": "[None, :]"}, plan.b: {"k": "[:, None]", "n": "[None, :]"}}
    factors = [f"{value[read]} * {value[read]}" if read.square else value[read] for read in (plan.a, plan.b)]
    after: list[str] = []
    if plan.windowed:
        head = [f"{side.index} = tl.program_id({axis}) * BLOCK_{role} + tl.arange(0, BLOCK_{role})"
                for axis, role, side in ((1, "M", m), (2, "N", n))]  # fmt: skip
        head += [f"{side.index}_inside = {side.index} < {side.size}" for side in (m, n)]
        head += [line for side in (m, n) for line in _taken_apart(plan, side)]
        loop = [f"{k.index} = {k.index}_start + tl.arange(0, BLOCK_K)", f"{k.index}_inside = {k.index} < {k.size}"]
        loop += _taken_apart(plan, k)
    else:
        head = [f"{side.index}_start = tl.program_id({axis}).to(tl.int64) * BLOCK_{role}"
                for axis, role, side in ((1, "M", m), (2, "N", n))]  # fmt: skip
        head += [f"{side.index} = tl.arange(0, BLOCK_{role})" for role, side in (("M", m), ("N", n), ("K", k))]
        head += [f"{side.index}_inside = {side.index} < {side.size} - {side.index}_start" for side in (m, n)]
        head += [f"{value[read]}_tile = {plan.tile(plan.layout(read), sides[read])}" for read in (plan.a, plan.b)]
        loop = [f"{k.index}_inside = {k.index} < {k.size} - {k.index}_start"]
        for read in (plan.a, plan.b):
            layout = plan.layout(read)
            strides = [plan.size[g] for g in layout[layout.index(k.groups[0]) + 1 :]]
            after.append(f"{value[read]}_start += {scaled(advance, strides)}")
    for read in (plan.a, plan.b):
        inside = " & ".join(f"{plan.sides[role].index}_inside{at}" for role, at in sides[read].items())
        tile = f"{value[read]}_tile"
        if plan.windowed:
            tile = f"({plan.tile(plan.layout(read), sides[read])})"
        if read.windows:
            lines, conditions, positions = _positions(plan, read, sides[read])
            loop += lines
            inside = " & ".join([inside, *conditions])
            tile = f"({plus(plan.tile(plan.layout(read), sides[read]), positions)})"
        loop.append(f"{value[read]} = tl.load({value[read]}_start + {tile}, mask={inside}, other=0).to(COMPUTE)")
    return {"head": head, "loop": loop, "after": after, "factors": factors}


def _taken_apart(plan: Plan, side: Side) -> list[str]:
    """The index of each axis along a side, where some tensor does not lie in memory as the side is walked."""
    if len(side.groups) == 1:
        return []
    index = {group: plan.names.index(group) for group in side.groups}
    return list(decode(side.index, side.groups, plan.size, index, widen=False).values())


def _positions(plan: Plan, read: Read, sides: Mapping[str, str]) -> tuple[list[str], list[str], str]:
    """Where windows are read: statements, the conditions to lie inside the tensor, and the offset."""
    lines, conditions = [], []
    index: dict[Group, str] = {}
    for window in read.windows:
        plan.program.require(window.divisor == 1, f"{read.tensor!r} is read at fractions")
        position = index[(window.axis.name,)] = plan.names.index((window.axis.name,))
        parts = [(window.place, window.step, sympy.Integer(0)), (window.tap, window.reach, window.offset)]
        terms = [f"{_affine(plan, i.name, slope, shift)}{sides[plan.role[i.name]]}" for i, slope, shift in parts]
        lines.append(f"{position} = {' + '.join(terms)}")
        conditions += [f"({position} >= 0)", f"({position} < {plan.size[(window.axis.name,)]})"]
    return lines, conditions, offset(plan.layout(read), index, plan.size)


def _affine(plan: Plan, axis: str, slope: Expr, shift: Expr) -> str:
    """`(kh * dilation_0 - padding_0)`"""
    index = plan.names.index((axis,))
    code = index if slope == 1 else f"{index} * {parenthesized(_code(plan, slope))}"
    if shift != 0:
        sign = "-" if shift.could_extract_minus_sign() else "+"
        code += f" {sign} {parenthesized(_code(plan, -shift if sign == '-' else shift))}"
    return parenthesized(code)


def _code(plan: Plan, expr: Expr) -> str:
    """An integer expression of the module's numbers."""
    options = {option: sympy.Symbol(plan.names.option(option), integer=True) for option in expr.atoms(Option)}
    return str(sympy.sstr(expr.xreplace(options), order="none")).replace("*", " * ")


def _result(
    plan: Plan, layout: tuple[Group, ...], origin: Mapping[Group, str], batch: Group | None, split: bool
) -> tuple[str, str]:
    """Where the tile of the result is written."""
    kept = {group: code for group, code in origin.items() if group in layout}
    sizes = [plan.size[g] for g in layout]
    part = scaled("part" if batch is None else "part.to(tl.int64)", sizes) if split else ""
    start = plus("out_ptr", part, offset(layout, kept, plan.size))
    if plan.program.within:
        number = parenthesized(plus(part, offset(layout, kept, plan.size)) or "0")
        return f"out_ptr + {number} * tiles + tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)", ""
    return start, plan.tile(layout, {"m": "[:, None]", "n": "[None, :]"})


def _spans(plan: Plan) -> list[str]:
    """How many elements the offsets inside a tile reach over, for each tensor."""
    outer = {axis for axis, role in plan.role.items() if role in ("step", "batch")}
    tensors = [read.axes for read in (plan.a, plan.b)] + ([] if plan.program.within else [plan.program.out])
    return [product(plan.names.extents(axis for axis in axes if axis not in outer)) for axes in tensors]


def _loop(plan: Plan, batch: Group | None, split: bool, narrow: bool) -> str:
    """The head of the loop over steps: in 64 bits, or in 32 where the index is divided first; split over programs."""
    index = "index" if narrow else "step"
    if batch is None:
        first, by = "tl.program_id(0)", "tl.num_programs(0)"
    else:
        first, by = "part", f"tl.num_programs(0) // {plan.size[batch]}"
    return f"for {index} in range({first if narrow else f'{first}.to(tl.int64)'}, steps, {by}):"


def _epilogue(program: Contraction, starts: Mapping[Read, str]) -> list[str]:
    """What follows a sum. Where steps of plain sums add up, nothing does: they go on in one accumulator."""
    value = "product" if program.accumulate else "total"
    result = f"{value} * {value}" if program.square_epilogue else value
    if program.weight is None:
        add = "+= " if program.accumulate else "= "
        return [f"total {add}{result}"] if program.square_epilogue else []
    program.require(bool(program.accumulate), "a weight needs axes to accumulate over")
    batch = {axis for axis in program.out if axis in program.a.axes and axis in program.b.axes}
    program.require(
        set(program.weight.axes) <= {*program.accumulate, *batch}, "a weight may carry accumulated and batch axes only"
    )
    return [f"weight = tl.load({starts[program.weight]}).to(COMPUTE)", f"total += weight * {result}"]
