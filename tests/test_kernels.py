"""Every shape of Triton kernel in the interpreter against plain torch, and the printer against mpmath."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import mpmath
import pytest
import sympy
import torch
from sympy import Abs, Function, Piecewise, Rational, erf, exp, log, pi, sqrt, symbols, tanh
from torch import Tensor

from kernel_programs import PROGRAMS, ROWS, write_package
from satchel_gen.emit.triton import render_kernels
from satchel_gen.emit.triton_expr import UnprintableError
from satchel_gen.lowering.programs import Contraction, Pointwise, Program, Read, Reduce

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run with TRITON_INTERPRET=1")

einsum = torch.einsum
x = symbols("x")
named = {name: Function(name) for name in ("sigmoid", "softplus", "log1p", "expm1")}


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ModuleType]]:
    """Emits programs as a package and imports its module of kernels."""
    number = itertools.count()
    folder = tmp_path_factory.mktemp("kernels")
    sys.path.insert(0, str(folder))

    def load(*programs: Program) -> ModuleType:
        name = f"emitted_{next(number)}"
        write_package(folder, name, programs)
        return importlib.import_module(f"{name}.kernels.programs")

    yield load
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def kernels(emitted: Callable[..., ModuleType]) -> ModuleType:
    return emitted(*PROGRAMS)


def softmax(f: Tensor) -> Tensor:
    return torch.softmax(f, 1)


def onehot(y: Tensor, classes: int) -> Tensor:
    """[..., R] to [..., K, R]."""
    return torch.nn.functional.one_hot(y, classes).movedim(-1, -2)


def factor(f: Tensor) -> Tensor:
    N, K, R = f.shape
    p = softmax(f)
    inner = torch.eye(K, dtype=f.dtype)[:, None, :, None] - p  # [v, n, k, r]
    columns = einsum("nvr,vnkr,qr->vqnkr", p.sqrt(), inner, torch.eye(R, dtype=f.dtype))
    return columns.reshape(K * R, N, K, R)


def per_sample(v: Tensor, x: Tensor) -> Tensor:
    return einsum("vnro,nri->vnoi", v, x)


NUMBERS = {"stride": (2,), "dilation": (3,), "padding": (4,), "eps": 0.3}


def windowed(v: Tensor, x: Tensor, weight_shape: tuple[int, ...], *_: object) -> Tensor:
    """Σ_r v[v, n, c, o, r] x[n, c, m, 2r + 3k − 4]."""
    places, taps = v.shape[-1], weight_shape[-1]
    padded = torch.nn.functional.pad(x, (4, 2 * places + 3 * taps))
    patches = torch.stack([padded[..., 3 * k : 3 * k + 2 * places : 2] for k in range(taps)], -1)
    return einsum("vncor,ncmrk->vncomk", v, patches)


def scaled_rows(v: Tensor, f: Tensor, W: Tensor, eps: float) -> Tensor:
    centred = f - f.mean((1, 2), keepdim=True)
    return v * W[:, None] * centred / (centred.square().mean((1, 2), keepdim=True) + eps).sqrt()


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "vjp": lambda v, x: v * (1 - x.tanh() ** 2),
    "diagonal": lambda d, x: d * x.sigmoid() ** 4 / 3,
    "kinked": lambda x: torch.where(x < 0, x / 10, torch.where(x < 4, x.abs().sqrt(), 2.0)),
    "constant": lambda x: torch.full_like(x, 0.1),
    "columns": lambda f: 2**0.5 * torch.eye(f.shape[1], dtype=f.dtype)[:, None].expand(-1, *f.shape),
    "sampled": lambda y, f: 2 * (f - y) / y.shape[0] ** 0.5,
    "scaled": lambda v, w, x: v * w**2 * x,
    "channels": lambda x, W: x * W[:, None] + W[:, None] ** 2,
    "separated": lambda d, x: einsum("no,ni->oi", d**2, x**2),
    "diagonal_sum": lambda d, x: einsum("nro,nri->oi", d, x**2),
    "sum_of_squares": lambda v, x: (per_sample(v, x) ** 2).sum((0, 1)),
    "signed": lambda v, sign, x: (sign[:, :, None, None] * per_sample(v, x) ** 2).sum((0, 1)),
    "batch_squares": lambda v, x: (per_sample(v, x) ** 2).sum(0),
    "rows": lambda d, W: einsum("nro,oi->nri", d, W**2),
    "each_square": lambda d, x: einsum("nro,nri->noi", d, x) ** 2,
    "squared_norm": lambda v, x: (per_sample(v, x) ** 2).sum((0, 2, 3)),
    "bias_per_sample": lambda v: v.sum(2),
    "bias_squares": lambda v: (v.sum(2) ** 2).sum((0, 1)),
    "bias_signed": lambda v, sign: (sign[:, :, None] * v.sum(2) ** 2).sum((0, 1)),
    "bias_norm": lambda v: (v.sum(2) ** 2).sum((0, 2)),
    "bias_diagonal": lambda d: d.sum((0, 1)),
    "last_inner": lambda d: (d.sum(2) ** 2).sum(0),
    "softmax_gradient": lambda f, y: softmax(f) - onehot(y, f.shape[1]),
    "softmax_factor": factor,
    "softmax_sampled": lambda y, f: (softmax(f) - onehot(y, f.shape[1])) / y.shape[0] ** 0.5,
    "window_squares": lambda *given: (windowed(*given) ** 2).sum((0, 1)),
    "window_norm": lambda *given: (windowed(*given) ** 2).sum((0, 2, 3, 4, 5)),
    "softmax_vjp": lambda v, f: softmax(f) * (v - (softmax(f) * v).sum(2, keepdim=True)),
    "scaled_rows": scaled_rows,
    "centred": lambda f: (f - f.mean(1, keepdim=True)) / f.amax(1, keepdim=True),
}

SHAPES = {
    "odd": {"v": 3, "m": 2, "n": 5, "r": 7, "o": 13, "i": 11, "j": 9, "c": 3, "k": 6},
    "one": {"v": 1, "m": 1, "n": 1, "r": 1, "o": 1, "i": 1, "j": 1, "c": 1, "k": 1},
    "single": {"v": 2, "m": 3, "n": 1, "r": 3, "o": 1, "i": 70, "j": 1030, "c": 2, "k": 37},
    "large": {"v": 2, "m": 2, "n": 3, "r": 66, "o": 130, "i": 65, "j": 4, "c": 5, "k": 2},
}


CASES = [
    *(("odd", dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)),
    ("one", torch.float32),
    ("single", torch.float64),
    ("large", torch.float32),
]


def operands(program: Program, extents: dict[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for read in program.all_reads:
        if read.tensor in made:
            continue
        shape = [extents[axis] for axis in read.axes]
        if read.tensor == "y" and program.name.startswith("softmax"):
            made["y"] = torch.randint(extents["k"], shape, generator=generator)
        elif read.tensor == "sign":
            made["sign"] = torch.randint(0, 2, shape, generator=generator).to(dtype) * 2 - 1
        else:
            made[read.tensor] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return made


def transposed(tensor: Tensor) -> Tensor:
    """The same values with other strides."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_kernel_agrees_with_torch(kernels: ModuleType, program: Program, shape: str, dtype: torch.dtype) -> None:
    agrees_with_torch(kernels, program, shape, dtype)


@pytest.mark.parametrize("program", ROWS, ids=lambda program: program.name)
def test_a_row_too_long_for_registers_is_read_step_by_step(
    kernels: ModuleType, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module(kernels.stage_tile.__module__), "RESIDENT", 8)
    agrees_with_torch(kernels, program, "single", torch.float64)


def agrees_with_torch(kernels: ModuleType, program: Program, shape: str, dtype: torch.dtype) -> None:
    tensors = operands(program, SHAPES[shape], dtype)
    given = [transposed(tensors[name]) for name in program.tensors]
    numbers: list[Any] = [tuple(SHAPES[shape][axis] for axis in axes) for axes in program.shapes.values()]
    numbers += [NUMBERS[option.attribute] for option in program.options]
    result = getattr(kernels, program.name)(*given, *numbers)
    wide = [t.double() if t.is_floating_point() else t for t in (tensors[name] for name in program.tensors)]
    expected = REFERENCES[program.name](*wide, *numbers)
    kept = isinstance(program, (Contraction, Reduce)) or program.name == "squared_norm"
    first = tensors[program.all_reads[0].tensor].dtype
    assert result.dtype == torch.promote_types(first, torch.float32)
    assert result.shape == expected.shape
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5 if kept or dtype == torch.float32 else 1e-2
    # Terms of both signs cancel: the error is measured against the sum of their magnitudes.
    magnitude = REFERENCES[program.name](*(t.abs() for t in wide), *numbers).max().item() / 20 if kept else 1.0
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance * magnitude)


def test_an_empty_batch_sums_to_zero(kernels: ModuleType) -> None:
    v, x = torch.ones(2, 0, 3, 4), torch.ones(0, 3, 5)
    assert torch.equal(kernels.sum_of_squares(v, x), torch.zeros(4, 5))
    assert torch.equal(kernels.bias_squares(v), torch.zeros(4))
    assert kernels.vjp(torch.ones(2, 0, 3), torch.ones(0, 3)).shape == (2, 0, 3)


def test_the_softmax_is_stable(kernels: ModuleType) -> None:
    f = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])[:, :, None]
    y = torch.tensor([[0], [1]])
    expected = torch.softmax(f, 1) - onehot(y, 3)
    torch.testing.assert_close(kernels.softmax_gradient(f, y), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("longest", [4096, 8])
def test_a_tile_of_excluded_classes_adds_nothing(
    kernels: ModuleType, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module(kernels.stage_tile.__module__), "RESIDENT", longest)
    f = torch.linspace(-3, 3, 80, dtype=torch.float64).reshape(1, 80, 1)
    f[:, :40] = -torch.inf
    y = torch.tensor([[50]])
    torch.testing.assert_close(kernels.softmax_gradient(f, y), torch.softmax(f, 1) - onehot(y, 80), rtol=0, atol=1e-15)


def test_a_stride_that_overflows_a_tile_is_refused(kernels: ModuleType) -> None:
    with pytest.raises(ValueError, match="overflows"):
        kernels.rows(torch.empty(1, 1, 2**25).expand(1, 1, 2**25), torch.empty(1).expand(2**25, 1))


# The printer

EXPRESSIONS: dict[str, tuple[sympy.Expr, Callable[..., object]]] = {
    "tanh": (tanh(x), mpmath.tanh),
    "sigmoid": (named["sigmoid"](x), lambda z: 1 / (1 + mpmath.exp(-z))),
    "softplus": (named["softplus"](x), lambda z: mpmath.log1p(mpmath.exp(z))),
    "log1p": (named["log1p"](Abs(x)), lambda z: mpmath.log1p(abs(z))),
    "expm1": (named["expm1"](-Abs(x)), lambda z: mpmath.expm1(-abs(z))),
    "erf": (erf(x), mpmath.erf),
    "exp": (exp(-Abs(x)), lambda z: mpmath.exp(-abs(z))),
    "sign": (sympy.sign(x), mpmath.sign),
    "rational": (x / 3 + Rational(5, 7), lambda z: z / 3 + mpmath.mpf(5) / 7),
    "irrational": (sqrt(2) * x / pi, lambda z: mpmath.sqrt(2) * z / mpmath.pi),
    "reciprocal": (1 / (1 + Abs(x)) ** 3, lambda z: 1 / (1 + abs(z)) ** 3),
    "inverse_root": (1 / sqrt(1 + x**2), lambda z: 1 / mpmath.sqrt(1 + z**2)),
    "powers": ((1 + Abs(x)) ** Rational(3, 2) / (1 + Abs(x)) ** 5, lambda z: (1 + abs(z)) ** mpmath.mpf(-3.5)),
    "negative": (-(x - 1) / (1 + x**2), lambda z: -(z - 1) / (1 + z**2)),
    "kink": (Piecewise((x, x > 0), (Rational(1, 10), Abs(x) < 1), (0, True)), lambda z: z if z > 0 else 0.1 if abs(z) < 1 else 0),
    "both": (Piecewise((x, (x > -1) & (x < 1)), (-1, x <= -1), (1, True)), lambda z: min(max(z, -1), 1)),
    "either": (Piecewise((0, (x < -1) | (x > 1)), (1, True)), lambda z: 0 if z < -1 or z > 1 else 1),
    "guarded": (Piecewise((x * log(x), x > 0), (0, True)), lambda z: z * mpmath.log(z) if z > 0 else 0),
    "clamped": (sympy.Max(sympy.Min(x, 3), -2), lambda z: max(min(z, 3), -2)),
    "shared": ((3 + tanh(x)) / (3 + tanh(x) ** 2), lambda z: (3 + mpmath.tanh(z)) / (3 + mpmath.tanh(z) ** 2)),
}  # fmt: skip
POINTS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    -0.5,
    1e-30,
    -1e-6,
    1e-3,
    3.0,
    -3.0,
    9.1,
    -9.1,
    20.5,
    -60.0,
    80.0,
    1e4,
    -1e4,
    -2.0,
    2.718,
]


@pytest.fixture(scope="module")
def printed(emitted: Callable[..., ModuleType]) -> ModuleType:
    return emitted(*(
        Pointwise(name=f"f_{name}", doc=str(expr), out=("n",), reads=(Read("x", ("n",)),), expr=expr)
        for name, (expr, _) in EXPRESSIONS.items()
    ))  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_printed_expression_agrees_with_mpmath(printed: ModuleType, name: str, dtype: torch.dtype) -> None:
    points = torch.tensor(POINTS, dtype=dtype)
    result = getattr(printed, f"f_{name}")(points)
    expected = torch.tensor(
        [float(EXPRESSIONS[name][1](mpmath.mpf(point))) for point in points.tolist()], dtype=torch.float64
    )  # type: ignore[arg-type]
    scale = expected.abs().clamp(min=1e-30)
    error = ((result.double() - expected).abs() / scale).max().item()
    assert error <= (2.4e-7 if dtype == torch.float32 else 1e-14)


def render(expr: sympy.Expr) -> str:
    program = Pointwise(name="f", doc="f", out=("n",), reads=(Read("x", ("n",)),), expr=expr)
    return render_kernels("Gudermann", "f", (program,))


@pytest.mark.parametrize(
    ("expr", "named_in_error"),
    [
        (sympy.gamma(x) + 1, "gamma"),
        (Function("mystery")(x), "mystery"),
        (x ** Rational(1, 3), "power"),
        (x + symbols("unbound"), "unbound"),
        (Piecewise((x, x > 0)), "Piecewise"),
        (sympy.Integral(x, x), "Integral"),
    ],
    ids=str,
)
def test_what_has_no_code_is_refused_by_name(expr: sympy.Expr, named_in_error: str) -> None:
    with pytest.raises(UnprintableError, match=f"(?s)Gudermann.*{named_in_error}"):
        render(expr)


def test_powers_are_products_and_conditions_use_bitwise_and() -> None:
    code = render(Piecewise(((1 + x) ** 3, (x > 0) & (x < 1)), (x**2, True)))
    assert "**" not in code
    assert "(x > 0) & (x < 1)" in code


def test_rendering_is_deterministic() -> None:
    assert render_kernels("All", "f", PROGRAMS) == render_kernels("All", "f", PROGRAMS)
