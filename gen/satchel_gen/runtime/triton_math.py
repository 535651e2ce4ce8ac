"""Stable elementary functions for Triton kernels, for float32 and float64 alike, on GPUs and in the interpreter.

Triton's own exp and log are fast but lose all digits in exp(x) - 1 and log(1 + x) near zero: there, series are used.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """exp(x) - 1: the Taylor series where |x| <= 1."""
    terms: tl.constexpr = 18 if x.dtype == tl.float64 else 10
    series = tl.zeros_like(x)
    for i in tl.static_range(terms):
        series = 1 + series * x * (1 / (terms + 1 - i))
    return tl.where(tl.abs(x) <= 1, series * x, tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """log(1 + x) = 2 artanh(s), s = x / (2 + x): the series of artanh where |s| <= 1/3, as x - s (x - rest)."""
    terms: tl.constexpr = 16 if x.dtype == tl.float64 else 7
    s = x / (2 + x)
    series = tl.zeros_like(x)
    for i in tl.static_range(terms):
        series = (series + 2 / (2 * (terms - i) + 1)) * s * s
    return tl.where((x >= -0.5) & (x <= 1), x - s * (x - series), tl.log(1 + x))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), with an exponential that cannot overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1, e) / (1 + e)


@triton.jit
def tanh(x):
    """sign(x) (1 - exp(-2|x|)) / (1 + exp(-2|x|))."""
    e = expm1(-2 * tl.abs(x))
    y = -e / (2 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|))."""
    return tl.where(x > 0, x, 0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)
