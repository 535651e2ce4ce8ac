"""The ATen printer over one list of expressions, against mpmath: large arguments and kinks included."""

from __future__ import annotations

import math

import mpmath
import pytest
import sympy
import torch
import torch.nn.functional as F
from sympy import Abs, Piecewise, Rational, erf, exp, log, pi, sign, sqrt, tanh

from satchel_gen.calculus.terms import CalculusError
from satchel_gen.emit.aten_expr import AtenPrinter
from satchel_gen.notation import sigmoid, softplus

z = sympy.Symbol("z", real=True)
EXPRESSIONS = [
    z, -z, z**2, z**3, 1 / (1 + z**2), sqrt(1 + z**2), z * Rational(1, 3), exp(-(z**2)), log(1 + z**2), tanh(z), erf(z / sqrt(2)),
    Abs(z), sign(z), sigmoid(z), softplus(z), sigmoid(z).diff(z), softplus(z).diff(z), z * sigmoid(z), (z * sigmoid(z)).diff(z),
    tanh(z).diff(z), tanh(z).diff(z, 2), Piecewise((z, z > 0), (0, True)), Piecewise((z, z > 0), (0, True)).diff(z),
    Piecewise((z, z > 0), (Rational(1, 100) * z, True)).diff(z), Piecewise((1, z > 1), (-1, z < -1), (z, True)),
    Piecewise((z, (z > -1) & (z < 1)), (0, True)), Piecewise((z, (z > 1) | (z < -1)), (0, True)), pi * z, (2 + z**2) ** Rational(-3, 2),
]  # fmt: skip
POINTS = [-1e4, -88.0, -20.0, -3.0, -1.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 1.0, 2.0, 20.0, 88.0, 1e4]


def exact(expression: sympy.Expr, point: float) -> float:
    functions = {"sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)), "softplus": lambda v: mpmath.log1p(mpmath.exp(v))}
    with mpmath.workdps(60):
        return float(sympy.lambdify(z, expression, modules=[functions, "mpmath"])(mpmath.mpf(point)))


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_printed_expressions_have_the_right_value(expression, dtype):
    points = torch.tensor(POINTS, dtype=dtype)
    code = AtenPrinter({z: "z"}, like="z").doprint(expression)
    found = eval(code, {"torch": torch, "F": F, "math": math, "z": points})
    expected = torch.tensor([exact(expression, float(p)) for p in points], dtype=torch.float64)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    # The functions' own error grows with the condition number of exp at large arguments.
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1)
    assert error.max() <= 64 * eps, dict(zip(POINTS, error.tolist(), strict=True))


@pytest.mark.parametrize("name", ["gamma", "besselj", "my_function"])
def test_unknown_functions_are_refused_by_name(name):
    with pytest.raises(CalculusError, match=name):
        AtenPrinter({z: "z"}).doprint(sympy.Function(name)(z))


def test_a_piecewise_needs_a_default():
    with pytest.raises(CalculusError, match="default"):
        AtenPrinter({z: "z"}, like="z").doprint(Piecewise((z, z > 0)))
