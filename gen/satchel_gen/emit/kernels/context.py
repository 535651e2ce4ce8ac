"""What the contexts of all kernel templates share: launchers, loops, printers and strides, as code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy

from ...lowering.programs import Axes, Pointwise, Program, Read, Resident, Row
from ...notation import Equal, Extent
from ..functions import signature
from ..triton_axes import Group, Names, offset, product, used
from ..triton_expr import Lines, TritonPrinter

Context = dict[str, Any]
#: Names that templates use: no tensor or axis may take them.
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
        "index",
    ]
)


def launcher(program: Program, code: Iterable[str], sizes: Mapping[str, str] | None = None) -> Context:
    """What all launchers share: the signature, contiguous operands, and the extents that `code` and `sizes` use."""
    names = Names(program)
    tensors = program.tensors
    layout: dict[str, Axes] = {}
    for read in program.all_reads:
        layout.setdefault(read.tensor, read.axes)
    sources = {f"{tensor}.shape": names.extents(layout[tensor]) for tensor in tensors}
    sources |= {shape: names.extents(axes) for shape, axes in program.shapes.items()}
    needed = used((extent for axes in sources.values() for extent in axes), [*code, *(sizes or {}).values()])
    extents: list[str] = []
    found: set[str] = set()
    for source, axes in sources.items():
        new = [name if name in needed and name not in found else "_" for name in axes]
        wanted = [name for name in new if name != "_"]
        if len(wanted) == 1:
            extents.append(f"{wanted[0]} = {source}[{new.index(wanted[0])}]")
        elif wanted:
            unused = new.index(wanted[0])
            extents.append(f"{', '.join(['*_', *new[unused:]] if unused > 1 else new)} = {source}")
        found |= set(wanted)
    shapes = ", ".join(f"{tensor} [{', '.join(names.extents(layout[tensor]))}]" for tensor in tensors)
    return {
        "signature": launcher_signature(program),
        "shapes": f"{shapes} -> [{', '.join(out_shape(program))}].",
        "reuse": program.reuse,
        "contiguous": f"{', '.join(tensors)} = {', '.join(f'{tensor}.contiguous()' for tensor in tensors)}",
        "extents": extents,
        "tensors": tensors,
        "first": program.all_reads[0].tensor,
        "sizes": tuple((sizes or {}).values()),
    }


def launcher_signature(program: Program) -> str:
    """A launcher's arguments: tensors, shapes, numbers."""
    numbers = dict.fromkeys(program.shapes, "tuple[int, ...]")
    numbers |= {option.attribute: option.kind for option in program.options}
    return signature(program.tensors, numbers)


def number_arguments(program: Program, names: Names) -> dict[str, str]:
    """The kernel's declaration of each number, and what the launcher passes. Unannotated, a float would lose half its bits."""
    return {
        f"{names.option(option)}: tl.{'int32' if option.is_integer else 'float64'}": str(option)
        for option in program.options
    }


def number_casts(program: Program, names: Names) -> list[str]:
    """The numbers in the type of the computation."""
    floats = [names.option(option) for option in program.options if not option.is_integer]
    return [f"{name} = tl.full((), {name}, COMPUTE)" for name in floats]


def out_shape(program: Program) -> list[str]:
    extents = Names(program).extents(program.out)
    merged = extents[: program.columns]
    head = [product(merged)] if len(merged) > 0 else []
    return head + extents[program.columns :]


def pointers(program: Program) -> list[str]:
    return [f"{tensor}_ptr" for tensor in program.tensors]


def delta_axes(expr: sympy.Expr, axes: Axes) -> tuple[str, ...]:
    """The axes whose index the expression compares."""
    deltas = sorted(expr.atoms(Equal), key=str)
    named = {str(getattr(argument, "name", argument)) for delta in deltas for argument in delta.args}
    return tuple(axis for axis in axes if axis in named)


def extent_axes(expr: sympy.Expr) -> list[str]:
    return [str(getattr(e.args[0], "name", e.args[0])) for e in expr.atoms(Extent)]


def used_in(read: Read, expr: sympy.Expr) -> bool:
    return read.symbol in {str(getattr(symbol, "name", symbol)) for symbol in expr.free_symbols}


def flat_offset(layout: Axes, indexed: Iterable[str], axes: Mapping[str, str], names: Names) -> str:
    sizes: dict[Group, str] = {(axis,): names.extent(axis) for axis in layout}
    return offset([(axis,) for axis in layout], {(axis,): axes[axis] for axis in indexed}, sizes)


def used_pointers(program: Program, code: Iterable[str]) -> list[str]:
    return list(used(pointers(program), code))


def printer_for(
    definition: str,
    program: Pointwise | Resident | Row,
    names: Names,
    axes: Mapping[str, str],
    lines: Lines,
    stages: Iterable[str] = (),
) -> TritonPrinter:
    values = {read.symbol: names.value(read) for read in program.reads} | {stage: stage for stage in stages}
    values |= {option.name: names.option(option) for option in program.options}
    extents = {axis: names.extent(axis) for axis in {*program.out, *(a for read in program.reads for a in read.axes)}}
    return TritonPrinter(definition, values, axes, extents, lines)


def hoisted_name(printer: TritonPrinter, lines: Lines) -> Callable[[sympy.Expr], str]:
    """Names a part that is computed once before a loop: `fixed`, `fixed_2`, …"""

    def name(expr: sympy.Expr) -> str:
        symbol = lines.fresh("fixed")
        printer.values[symbol] = printer.statements(expr, symbol)
        return symbol

    return name


def loop_head(index: str, count: str, split: int | None, narrow: bool) -> str:
    """The head of a loop over `count` in 64 bits, or in 32 where the index is divided first; split over a grid axis."""
    if split is None:
        return f"for index in range({count}):" if narrow else f"for {index} in range(tl.cast(0, tl.int64), {count}):"
    first = f"tl.program_id({split})" if narrow else f"tl.program_id({split}).to(tl.int64)"
    return f"for {'index' if narrow else index} in range({first}, {count}, tl.num_programs({split})):"


def divided(statements: Iterable[str]) -> bool:
    """Whether statements take the flat 32-bit `index` of their loop apart."""
    return bool(used(["index"], statements))


def decoded(
    groups: Sequence[Group], index: Mapping[Group, str], statements: Mapping[Group, str], code: Iterable[str]
) -> list[str]:
    """The statements that the loop over steps begins with, where more than the flat index is needed."""
    if len(groups) < 2:
        return []
    found = used(["step", *index.values()], code)
    lines = [statements[group] for group in groups if index[group] in found]
    return ["step = tl.cast(index, tl.int64)", *lines] if "step" in found and lines else lines


def parenthesized(code: str) -> str:
    return f"({code})" if " " in code else code


def autotune_key(names: Iterable[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


def step_index_of(
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


def tile_strides_of(tiles: Iterable[tuple[tuple[Group, ...], tuple[Group, ...]]], names: Names) -> list[str]:
    """The strides inside tiles, but for 1 and repetitions, as the launcher's products of extents."""
    found = []
    for layout, tiled in tiles:
        for group in tiled:
            after = [extent for g in layout[layout.index(group) + 1 :] for extent in names.extents(g)]
            found.append(product(after))
    return [stride for stride in dict.fromkeys(found) if stride != "1"] or ["1"]
