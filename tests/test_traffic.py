"""The bytes that emitted kernels move, counted in the interpreter, against what their programs say."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import DEFINITIONS, SECOND_ORDER
from emitted import emitted_programs, lowered_layers
from kernel_programs import POINTWISE, write_package
from satchel import backend, backpack, extend, extensions
from satchel.runtime import triton_launch
from satchel_gen.definitions import Feature
from satchel_gen.lowering.kernels import KernelRule, layer_kernels
from satchel_gen.lowering.plan import Window
from satchel_gen.lowering.programs import Contraction, Gram, Program, Read, Row
from satchel_gen.lowering.rules import LoweredLayer
from satchel_gen.lowering.traffic import feature_rules, launched
from satchel_gen.notation import Option
from traffic import Launch, counted

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run with TRITON_INTERPRET=1")

#: Bytes moved over those of each operand and of the result: what sectors at the edges of tiles may add.
OVERHEAD = 1.15
TILED = (Contraction, Gram)
GEOMETRY = {"stride": 2, "dilation": 1, "padding": 1}


def selected(wanted: Callable[[Program], bool]) -> Any:
    found = [(module, program) for module, program in emitted_programs() if wanted(program)]
    return pytest.mark.parametrize(
        "module,program", found, ids=[f"{module}-{program.name}" for module, program in found]
    )


def extents(program: Program) -> dict[str, int]:
    """Sizes of all axes: several blocks and tiles each way, and lines of whole sectors."""
    axes = {axis for read in program.all_reads for axis in (*read.axes, *read.walked)}
    sizes = dict.fromkeys(axes | {axis for shape in program.shapes.values() for axis in shape}, 8)
    sizes |= {"v": 4, "m": 4, "n": 64, "e": 64, "o": 64, "j": 64}
    if isinstance(program, Row):
        sizes[program.row] = 16
    if isinstance(program, TILED):
        sizes |= {"v": 2, "n": 3, "r": 80, "o": 70, "i": 70, "g": 2, "c": 70}
        for k, window in enumerate(windows(program)):
            sizes |= {window.axis.name: 4, window.place.name: 2 if k else 5, window.tap.name: 1 if k else 2}
    return sizes | {axis: sizes[other] for axis, other in program.equal.items()}


def windows(program: Program) -> list[Window]:
    return [window for read in program.all_reads for window in read.windows]


def number(option: Option) -> Any:
    """A tuple of as many as the module has axes, or one number."""
    value = GEOMETRY.get(option.attribute, 0.5)
    return value if option.part is None else (value,) * 3


def operands(program: Program, sizes: dict[str, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layouts = {read.tensor: read.axes for read in reversed(program.all_reads)}
    made = {name: torch.rand([sizes[a] for a in axes], generator=generator) + 0.1 for name, axes in layouts.items()}
    classes = {"target", "sampled"} & set(made) if isinstance(program, Row) else set()
    return made | {name: (made[name] * 8).long() for name in classes}


def run(kernels: Any, program: Program, sizes: dict[str, int]) -> tuple[Launch, Tensor]:
    """The launch of a program's kernel, and its result."""
    tensors = operands(program, sizes)
    shapes = [tuple(sizes[axis] for axis in axes) for axes in program.shapes.values()]
    numbers = {option.attribute: number(option) for option in program.options}
    with counted() as launches:
        result = getattr(kernels, program.name)(*(tensors[t] for t in program.tensors), *shapes, *numbers.values())
    (launch,) = launches
    return launch, result


def overhead(launch: Launch, result: Tensor) -> float:
    """The bytes moved over those of each operand once and of the result once."""
    return launch.bytes / (sum(t.nbytes for t in launch.operands.values()) + result.nbytes)


def emitted(module: str) -> Any:
    return importlib.import_module(f"satchel.kernels.{module}")


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small problem as a large one, whose blocks fill the device without a split of its columns and sums."""
    monkeypatch.setattr(triton_launch, "PROGRAMS", 1)


@pytest.mark.usefixtures("filled")
@selected(lambda program: not isinstance(program, TILED))
def test_each_tensor_is_read_once_and_the_result_written_once(module: str, program: Program) -> None:
    launch, result = run(emitted(module), program, extents(program))
    assert launch.stored == {"out": result.numel()}
    assert overhead(launch, result) <= OVERHEAD, {n: launch.moved[n] / t.nbytes for n, t in launch.tensors.items()}


@selected(lambda program: isinstance(program, Row) and program.name == "gradient")
def test_a_row_too_long_for_registers_is_read_twice(module: str, program: Program, monkeypatch: Any) -> None:
    """For its logsumexp, and for the result."""
    monkeypatch.setattr(triton_launch, "RESIDENT", 8)
    launch, result = run(emitted(module), program, extents(program))
    assert launch.loaded["input"] == 2 * launch.stored["out"] == 2 * result.numel()


@selected(lambda program: isinstance(program, TILED))
def test_operands_are_loaded_as_often_as_their_tiles_say(module: str, program: Program) -> None:
    sizes = extents(program)
    launch, _ = run(emitted(module), program, sizes)
    blocks = {name: 64 for name in ("BLOCK_M", "BLOCK_N")}
    known = {axis.upper(): size for axis, size in sizes.items()} | blocks
    for read in program.all_reads:
        times = program.loads(read)
        predicted = times.subs({symbol: known[symbol.name] for symbol in times.free_symbols})
        assert launch.loaded[read.tensor] == predicted * walked(read, sizes), f"{read.tensor}: {times}"


def walked(read: Read, sizes: dict[str, int]) -> int:
    """The elements that a read walks over: with windows, the pairs of a place and a tap that lie inside."""
    plain = math.prod(sizes[axis] for axis in read.plain)
    return plain * math.prod(inside(window, sizes) for window in read.windows)


def inside(window: Window, sizes: dict[str, int]) -> int:
    def value(expr: Any) -> int:
        return int(expr.subs({option: GEOMETRY[option.attribute] for option in expr.atoms(Option)}))

    step, reach, offset = map(value, (window.step, window.reach, window.offset))
    places, taps, size = (sizes[index.name] for index in (window.place, window.tap, window.axis))
    return sum(0 <= step * p + reach * k + offset < size for p in range(places) for k in range(taps))


@selected(lambda program: isinstance(program, Gram) or getattr(program, "square_epilogue", False))
def test_products_are_squared_where_they_arise(module: str, program: Any) -> None:
    """None is written: the result is, or partial sums of at least four."""
    sizes = {axis: min(size, 4) for axis, size in extents(program).items()} | {"n": 8, "v": 2, "g": 1}
    launch, result = run(emitted(module), program, sizes)
    summed = program.sums if isinstance(program, Contraction) else (program.rows,)
    products = math.prod(sizes[a] for a in {*program.a.walked, *program.b.walked} - {*summed})
    assert launch.stored == {"out": result.numel()} or launch.stored["out"] <= products / 4


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("again", [False, True])
def test_a_second_load_is_seen(again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"loads_{'twice' if again else 'once'}"
    path = write_package(tmp_path, name, POINTWISE[:1])
    if again:
        path.write_text(
            re.sub(r"^ .*tl\.load\(v_ptr.*\n", r"\g<0>\g<0>", path.read_text(), count=1, flags=re.MULTILINE)
        )
    kernels = importlib.import_module(f"{name}.kernels.programs")
    launch, result = run(kernels, POINTWISE[0], extents(POINTWISE[0]))
    assert (overhead(launch, result) > OVERHEAD) == again
    sys.modules.pop(name)


@pytest.mark.parametrize(
    "feature", [f for f in DEFINITIONS.features if f.name not in SECOND_ORDER], ids=lambda f: f.name
)
def test_a_feature_launches_the_kernels_of_its_rules(feature: Feature) -> None:
    network = nn.Sequential(
        nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 3), nn.LayerNorm(3)
    )
    model, loss = extend(network), extend(nn.CrossEntropyLoss())
    with counted() as launches, backend("triton"), backpack(getattr(extensions, feature.name)()):
        loss(model(torch.rand(5, 4)), torch.arange(5) % 3).backward()
    names = Counter(launch.kernel.removesuffix("_kernel") for launch in launches)
    found = {name: n for name, n in names.items() if name not in ("gradient", "exact_factor", "mc_factor")}
    known = {definition.name: (lowered, layer_kernels(lowered)) for definition, lowered in lowered_layers()}
    said = [programs(feature, *known[type(module).__name__], {"R": 1, "S": 1}) for module in network]
    assert found == Counter(itertools.chain(*said))


def programs(feature: Feature, lowered: LoweredLayer, kernels: list[KernelRule], sizes: dict[str, int]) -> list[str]:
    """The kernels that a layer runs for a feature."""
    by_rule = {kernel.rule.name: launched(kernel, sizes) for kernel in kernels}
    found = [by_rule.get(rule.name) for rule in feature_rules(lowered, feature)]
    return [program.name for program in found if program is not None]
