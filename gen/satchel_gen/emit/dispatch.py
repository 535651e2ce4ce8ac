"""Context of dispatch.jinja: a layer's Triton kernels, and the functions that choose between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy

from ..formula import render_formula
from ..lowering.kernels import KernelRule
from ..lowering.programs import Program, Resident
from ..lowering.rules import LoweredRule
from ..notation import Extent
from .aten import Body, unpack_extents
from .functions import signature
from .kernels.context import launcher_signature


@dataclass(frozen=True)
class Dispatcher:
    """A Triton rule that takes another program where axes have extent 1."""

    name: str
    formula: str
    signature: str
    valid: str
    lines: tuple[str, ...]
    separated: str
    otherwise: str
    before: tuple[str, ...] = ()  # what `valid` needs


def layer_programs(kernels: Iterable[KernelRule]) -> tuple[list[Program], list[Dispatcher]]:
    """The kernels of a layer and the functions that choose between them."""
    programs: list[Program] = []
    dispatchers = []
    for kernel in kernels:
        programs.append(kernel.program)
        if kernel.separated_program is not None:
            programs.append(kernel.separated_program)
        if kernel.separated is not None:
            dispatchers.append(_dispatcher(kernel))
        if isinstance(kernel.program, Resident):
            dispatchers.append(_within_registers(kernel.rule, kernel.program))
    return programs, dispatchers


def _dispatcher(kernel: KernelRule) -> Dispatcher:
    rule, separated = kernel.rule, kernel.separated
    assert separated is not None
    body = Body(dict(rule.arguments))
    if kernel.separated_program is None:
        result = body(separated.tree)
    else:
        program = kernel.separated_program
        given = []
        for read, node in zip((program.a, program.b), kernel.operands, strict=True):
            # A square is taken by the kernel, on load.
            text = body(node.children[0] if read.square and hasattr(node, "children") else node)
            given.append(body.local(read.tensor, text) if read.tensor in ("total", "product") else text)
        result = f"{program.name}({', '.join(given)})"
    first = next(iter(rule.arguments))
    places = [list(rule.arguments[first]).index(i) for i in separated.unit]
    return Dispatcher(
        name=rule.name,
        formula=render_formula(rule.formula),
        signature=signature(rule.arguments, {}),
        valid=" and ".join(f"{first}.shape[{place}] == 1" for place in places),
        lines=tuple(unpack_extents(body.extents, rule.arguments) + body.lines),
        separated=result,
        otherwise=f"{kernel.program.name}({', '.join(rule.arguments)})",
    )


def _within_registers(rule: LoweredRule, program: Resident) -> Dispatcher:
    """The kernel where a row fits into registers, else ATen."""
    body = Body(dict(rule.arguments))
    axes = {i.name: i for i in rule.formula.axes}
    elements, stride = (
        body.scalar(sympy.Mul(*(Extent(axes[a]) for a in part))) for part in (program.row, program.after)
    )
    called = ", ".join([*rule.arguments, *rule.numbers])
    return Dispatcher(
        name=rule.name,
        formula=program.value,
        signature=launcher_signature(program),
        valid=f"resident({elements}, {stride}, {', '.join(rule.arguments)})",
        lines=(),
        separated=f"{program.name}({called})",
        otherwise=f"aten.{rule.name}({called})",
        before=tuple(unpack_extents(body.extents, rule.arguments)),
    )
