"""Programs of every shape, over expressions that belong to no definition, and how to turn them into a package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from sympy import Function, Integer, Piecewise, Rational, exp, sqrt, symbols, tanh

import satchel_gen
from satchel_gen.emit.triton import render_kernels
from satchel_gen.lowering.plan import Window
from satchel_gen.lowering.programs import (
    Contraction,
    Gram,
    Pointwise,
    Program,
    Read,
    Reduce,
    Resident,
    Row,
    Stage,
)
from satchel_gen.notation import Equal, Extent, Index, Option

v, x, d, f, w, y, W = symbols("v x d f w y W")
lse, peak, f_v = symbols("lse peak f_v")
sigmoid = Function("sigmoid")

_V_NROWS = Read("v", ("v", "n", "r", "o"))
_X = Read("x", ("n", "r", "i"))

POINTWISE: tuple[Program, ...] = (
    Pointwise(
        name="vjp", doc="out[v, n, j] = v[v, n, j] (1 − tanh² x[n, j])", out=("v", "n", "j"),
        reads=(Read("v", ("v", "n", "j")), Read("x", ("n", "j"))), expr=v * (1 - tanh(x) ** 2),
    ),
    Pointwise(
        name="diagonal", doc="out[n, j] = d[n, j] σ(x[n, j])⁴ / 3", out=("n", "j"),
        reads=(Read("d", ("n", "j")), Read("x", ("n", "j"))), expr=d * sigmoid(x) ** 4 / 3,
    ),
    Pointwise(
        name="kinked", doc="out[n, j] = 0.1 x below 0, √x up to 4, else 2", out=("n", "j"), reads=(Read("x", ("n", "j")),),
        expr=Piecewise((Rational(1, 10) * x, x < 0), (sqrt(x), x < 4), (2, True)),
    ),
    Pointwise(
        name="constant", doc="out[n, j] = 1/10", out=("n", "j"), reads=(Read("x", ("n", "j")),), expr=Rational(1, 10) + 0 * x,
    ),
    Pointwise(
        name="columns", doc="out[v, n, j] = √2 δ(v, j)", out=("v", "n", "j"), reads=(Read("f", ("n", "j")),),
        expr=sqrt(2) * Equal("v", "j"), equal={"v": "j"},
    ),
    Pointwise(
        name="sampled", doc="out[m, n, j] = 2 (f[n, j] − y[m, n, j]) / √M", out=("m", "n", "j"),
        reads=(Read("f", ("n", "j")), Read("y", ("m", "n", "j"))), expr=2 * (f - y) / sqrt(Extent("m")), signature=("y", "f"),
    ),
    Pointwise(
        name="scaled", doc="out[v, n, j] = v[v, n, j] w[j]² x[n, j]", out=("v", "n", "j"),
        reads=(Read("v", ("v", "n", "j")), Read("w", ("j",), square=True), Read("x", ("n", "j"))), expr=v * w * x,
    ),
    Pointwise(
        name="channels", doc="out[n, c, j] = x[n, c, j] W[c] + W[c]²", out=("n", "c", "j"),
        reads=(Read("x", ("n", "c", "j")), Read("W", ("c",))), expr=x * W + W**2,
    ),
)  # fmt: skip

CONTRACTIONS: tuple[Program, ...] = (
    Contraction(
        name="separated", doc="out[o, i] = Σ_n d[n, o]² x[n, i]²", out=("o", "i"), sums=("n",),
        a=Read("d", ("n", "o"), square=True), b=Read("x", ("n", "i"), square=True),
    ),
    Contraction(
        name="diagonal_sum", doc="out[o, i] = Σ_{n,r} d[n, r, o] x[n, r, i]²", out=("o", "i"), sums=("n", "r"),
        a=Read("d", ("n", "r", "o")), b=Read("x", ("n", "r", "i"), square=True),
    ),
    Contraction(
        name="sum_of_squares", doc="out[o, i] = Σ_{v,n} (Σ_r v[v, n, r, o] x[n, r, i])²", out=("o", "i"), sums=("r",),
        accumulate=("v", "n"), square_epilogue=True, a=_V_NROWS, b=_X,
    ),
    Contraction(
        name="signed", doc="out[o, i] = Σ_{v,n} sign[v, n] (Σ_r v[v, n, r, o] x[n, r, i])²", out=("o", "i"), sums=("r",),
        accumulate=("v", "n"), square_epilogue=True, a=_V_NROWS, b=_X, weight=Read("sign", ("v", "n")),
        signature=("v", "sign", "x"),
    ),
    Contraction(
        name="batch_squares", doc="out[n, o, i] = Σ_v (Σ_r v[v, n, r, o] x[n, r, i])²", out=("n", "o", "i"), sums=("r",),
        accumulate=("v",), square_epilogue=True, a=_V_NROWS, b=_X,
    ),
    Contraction(
        name="rows", doc="out[n, r, i] = Σ_o d[n, r, o] W[o, i]²", out=("n", "r", "i"), sums=("o",),
        a=Read("d", ("n", "r", "o")), b=Read("W", ("o", "i"), square=True),
    ),
    Contraction(
        name="each_square", doc="out[n, o, i] = (Σ_r d[n, r, o] x[n, r, i])²", out=("n", "o", "i"), sums=("r",),
        square_epilogue=True, a=Read("d", ("n", "r", "o")), b=_X,
    ),
)  # fmt: skip

_STRIDE, _DILATION, _PADDING = (Option(name, 0, integer=True) for name in ("stride", "dilation", "padding"))
_WINDOW = Window(Index("i"), Index("r"), Index("k"), _STRIDE, _DILATION, -_PADDING, Integer(1))
_WINDOWED = {
    "sums": ("r",), "a": Read("v", ("v", "n", "c", "o", "r")), "b": Read("x", ("n", "c", "m", "i"), windows=(_WINDOW,)),
    "square_epilogue": True, "shapes": {"weight_shape": ("m", "k")}, "options": (_DILATION, _PADDING, _STRIDE),
}  # fmt: skip

WINDOWS: tuple[Program, ...] = (
    Contraction(
        name="window_squares", doc="out[c, o, m, k] = Σ_{v,n} (Σ_r v[v, n, c, o, r] x[n, c, m, stride r + dilation k − padding])²",
        out=("c", "o", "m", "k"), accumulate=("v", "n"), **_WINDOWED,
    ),
    Contraction(
        name="window_norm", doc="out[n] = Σ_{v,c,o,m,k} (Σ_r v[v, n, c, o, r] x[n, c, m, stride r + dilation k − padding])²",
        out=("n",), accumulate=("v", "c"), within=("o", "m", "k"), **_WINDOWED,
    ),
)  # fmt: skip

GRAMS: tuple[Program, ...] = (
    Gram(
        name="squared_norm", doc="out[n] = Σ_v Σ_{r,s} (Σ_o v[v, n, r, o] v[v, n, s, o]) (Σ_i x[n, r, i] x[n, s, i])",
        out=("n",), a=_V_NROWS, b=_X, rows="r", outer=("v",),
    ),
)  # fmt: skip

REDUCTIONS: tuple[Program, ...] = (
    Reduce(name="bias_per_sample", doc="out[v, n, o] = Σ_r v[v, n, r, o]", out=("v", "n", "o"), read=_V_NROWS, inner=("r",)),
    Reduce(
        name="bias_squares", doc="out[o] = Σ_{v,n} (Σ_r v[v, n, r, o])²", out=("o",), read=_V_NROWS, inner=("r",), square=True,
        outer=("v", "n"),
    ),
    Reduce(
        name="bias_signed", doc="out[o] = Σ_{v,n} sign[v, n] (Σ_r v[v, n, r, o])²", out=("o",), read=_V_NROWS, inner=("r",),
        square=True, outer=("v", "n"), weight=Read("sign", ("v", "n")),
    ),
    Reduce(
        name="bias_norm", doc="out[n] = Σ_{v,o} (Σ_r v[v, n, r, o])²", out=("n",), read=_V_NROWS, inner=("r",), square=True,
        outer=("v", "o"),
    ),
    Reduce(
        name="bias_diagonal", doc="out[o] = Σ_{n,r} d[n, r, o]", out=("o",), read=Read("d", ("n", "r", "o")), outer=("n", "r"),
    ),
    Reduce(
        name="last_inner", doc="out[o] = Σ_n (Σ_r d[n, o, r])²", out=("o",), read=Read("d", ("n", "o", "r")), inner=("r",),
        square=True, outer=("n",),
    ),
)  # fmt: skip

_F = Read("f", ("n", "k", "r"))
_LSE = Stage("lse", "logsumexp", f)
_P = exp(f - lse)

ROWS: tuple[Program, ...] = (
    Row(
        name="softmax_gradient", doc="out[n, k, r] = exp(f[n, k, r] − lse[n, r]) − [k = y[n, r]]", out=("n", "k", "r"),
        row="k", reads=(_F, Read("y", ("n", "r"))), stages=(_LSE,), expr=_P - Equal("k", "y"),
    ),
    Row(
        name="softmax_factor", doc="out[v·R + q, n, k, r] = √p[n, v, r] ([v = k] − p[n, k, r]) [q = r]",
        out=("v", "q", "n", "k", "r"), columns=2, equal={"v": "k", "q": "r"}, row="k",
        reads=(_F, Read("f", ("n", "v", "r"), alias="f_v")), stages=(_LSE,),
        expr=exp((f_v - lse) / 2) * (Equal("v", "k") - _P) * Equal("q", "r"),
    ),
    Row(
        name="softmax_sampled", doc="out[m, n, k, r] = (p[n, k, r] − [k = y[m, n, r]]) / √M", out=("m", "n", "k", "r"), row="k",
        reads=(_F, Read("y", ("m", "n", "r"))), stages=(_LSE,), expr=(_P - Equal("k", "y")) / sqrt(Extent("m")),
        signature=("y", "f"),
    ),
    Row(
        name="centred", doc="out[n, k, r] = (f − Σ_k f / K) / max_k f", out=("n", "k", "r"), row="k", reads=(_F,),
        stages=(Stage("total_f", "sum", f), Stage("peak", "max", f)), expr=(f - symbols("total_f") / Extent("k")) / peak,
    ),
)  # fmt: skip

eps, mean, square, bar = symbols("eps mean square bar", real=True)
_f, _v, _W = symbols("f v W", real=True)

RESIDENTS: tuple[Program, ...] = (
    Resident(
        name="softmax_vjp", doc="lse[n, r] = log Σ_j exp f[n, j, r]; out[v, n, j, r] = p[n, j, r] (v − Σ_j p v)",
        out=("v", "n", "j", "r"), row=("j",), reads=(Read("v", ("v", "n", "j", "r")), Read("f", ("n", "j", "r"))),
        stages=(Stage("lse", "logsumexp", _f), Stage("bar", "sum", exp(_f - symbols("lse", real=True)) * _v)),
        expr=exp(_f - symbols("lse", real=True)) * (_v - bar),
    ),
    Resident(
        name="scaled_rows", doc="out[v, n, c, j] = v W[c] (f − mean) / √(mean square + eps)", out=("v", "n", "c", "j"),
        row=("c", "j"), reads=(Read("v", ("v", "n", "c", "j")), Read("f", ("n", "c", "j")), Read("W", ("c",))),
        options=(Option("eps"),),
        stages=(
            Stage("mean", "sum", _f / (Extent("c") * Extent("j"))),
            Stage("square", "sum", (_f - mean) ** 2 / (Extent("c") * Extent("j"))),
            Stage("scaled", "value", _v * _W),
        ),
        expr=symbols("scaled", real=True) * (_f - mean) * (square + Option("eps")) ** Rational(-1, 2),
    ),
)  # fmt: skip

PROGRAMS = (*POINTWISE, *CONTRACTIONS, *WINDOWS, *GRAMS, *REDUCTIONS, *ROWS, *RESIDENTS)


def write_package(folder: Path, name: str, programs: tuple[Program, ...], formula: str = "several") -> Path:
    """A package `name` in `folder` with what kernels need of the runtime, and one module of kernels; gives its path."""
    package = folder / name
    runtime = Path(satchel_gen.__file__).parent / "runtime"
    for part in ("runtime", "kernels"):
        (package / part).mkdir(parents=True)
        (package / part / "__init__.py").touch()
    (package / "__init__.py").touch()
    needed = (
        "kept.py",
        "memory.py",
        "settings.py",
        "sums.py",
        "torch_private.py",
        "triton_launch.py",
        "triton_math.py",
    )
    for module in needed:
        shutil.copy(runtime / module, package / "runtime" / module)
    path = package / "kernels" / "programs.py"
    path.write_text(render_kernels("Programs", formula, programs))
    format_file(path)
    return path


def format_file(path: Path) -> None:
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", "--line-length", "120", str(path)], check=True)
