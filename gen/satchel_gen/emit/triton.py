"""One emitted module of Triton kernels per definition: contexts, templates, and what the module imports."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..lowering.programs import Contraction, Gram, Pointwise, Program, Reduce, Resident, Row
from .kernels import contraction, gram, pointwise, reduce, resident, row
from .triton_expr import STABLE

LAUNCH = (
    "GRAM_TILES", "MATRIX_TILES", "POINTWISE_BLOCK", "REDUCE_LANES", "REDUCE_ROWS", "SMALLEST_TILE",
    "accumulator", "cdiv", "check_spans", "check_strides", "fitting", "gram_rows", "precision", "registers", "resident",
    "row_tile", "splits", "stage_tile", "triton_type",
)  # fmt: skip

Builder = Callable[[str, Any], dict[str, Any]]
SHAPES: Mapping[type[Program], tuple[str, Builder]] = {
    Pointwise: ("pointwise", pointwise.pointwise),
    Contraction: ("contraction", contraction.contraction),
    Gram: ("gram", gram.gram),
    Reduce: ("reduce", reduce.reduce),
    Row: ("row", row.row),
    Resident: ("resident", resident.resident),
}


def render_kernels(module: str, formula: str, programs: Sequence[Program], choices: str = "", aten: str = "") -> str:
    """The source of a kernels module, before `ruff format`: a kernel and its launcher for each program.

    `choices` are functions that choose between them and the module `aten` of the layer.
    """
    code = [_render(*SHAPES[type(program)], module, program) for program in programs]
    words = set(re.findall(r"\w+", "\n".join([*code, choices])))
    context = {
        "title": f"Triton kernels of {module}.",
        "formula": formula,
        "programs": code,
        "choices": choices,
        "aten": aten if "aten" in words else "",
        "launch_imports": [name for name in LAUNCH if name in words],
        "math_imports": sorted(name for name in STABLE if re.search(rf"(?<![\w.]){name}\(", "\n".join(code))),
    }
    return environment().get_template("kernels/module.py.jinja").render(module=context)


def _render(template: str, context: Builder, module: str, program: Program) -> str:
    return environment().get_template(f"kernels/{template}.py.jinja").render(p=context(module, program))


@functools.cache
def environment() -> jinja2.Environment:
    """Templates lie in the package when it is installed, and at the root of the repository."""
    package = Path(__file__).parents[1] / "templates"
    folder = package if package.is_dir() else Path(__file__).parents[3] / "templates"
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
