"""The formulas that features are made of, over a layer's Jacobians. Index groups stand for all axes of one sample:

    y output of the layer, x its input, p a parameter; v columns of a factor, n samples.

Where the parameter's Jacobian contains δ(o, o′) · a[n, q, i], its indices fall into o and i, and q is shared: the Kronecker
structure, found by `calculus.kronecker`. There, s[v, n, q, o] is the factor and a[n, q, i] the input that it meets.
"""

from __future__ import annotations

from sympy import Symbol

from satchel_gen.notation import Sum, extent, indices, tensors

from .model import Quantity

n, v, e, y, y2, x, x2, p, q, q2, o, o2, i, i2 = indices("n v e y y2 x x2 p q q2 o o2 i i2")
J, H, S, d, G, M, delta, sign, s, a = tensors("J H factor curvature averaged rows delta sign s a")
N = extent(n)

# How curvature passes a layer.
VJP = Quantity("vjp", (v, n, x), Sum(J[n, y, x] * S[v, n, y], y))
DIAGONAL = Quantity("diagonal", (n, x), Sum(J[n, y, x] ** 2 * d[n, y], y))
MEAN_VJP = Quantity("mean_vjp", (e, x), Sum(J[n, y, x] * M[e, y], n, y) / N)
SANDWICH = Quantity("sandwich", (x, x2), Sum(J[n, y, x] * J[n, y2, x2] * G[y, y2], n, y, y2) / N)
RESIDUAL = Quantity("residual", (n, x), Sum(H[n, y, x, x2] * delta[n, y], y))
PASSES = (VJP, DIAGONAL, MEAN_VJP, SANDWICH, RESIDUAL)

# What it leaves on a parameter: the pullback T[v, n, p] = Σ_y J[n, y, p] factor[v, n, y] and its reductions.
T = Sum(J[n, y, p] * S[v, n, y], y)
PER_SAMPLE = Quantity("per_sample", (v, n, p), T)
GRADIENT = Quantity("gradient", (p,), Sum(T, v, n))
SUM_OF_SQUARES = Quantity("sum_of_squares", (p,), Sum(T**2, v, n))
SQUARED_NORM = Quantity("squared_norm", (n,), Sum(T**2, v, p))
SIGNED_SUM_OF_SQUARES = Quantity("signed_sum_of_squares", (p,), Sum(sign[v, n] * T**2, v, n))
DIAGONAL_SUM = Quantity("diagonal_sum", (p,), Sum(J[n, y, p] ** 2 * d[n, y], n, y))
PULLBACKS = (PER_SAMPLE, GRADIENT, SUM_OF_SQUARES, SQUARED_NORM, SIGNED_SUM_OF_SQUARES, DIAGONAL_SUM)

# Kronecker factors, for the three ways to treat shared axes (Eschenhagen et al., 2023; "backpack" as in Dangel et al., 2020).
OUTPUT_FACTOR_EXPAND = Quantity("output_factor_expand", (o, o2), Sum(s[v, n, q, o] * s[v, n, q, o2], v, n, q))
OUTPUT_FACTOR_REDUCE = Quantity(
    "output_factor_reduce", (o, o2), Sum(Sum(s[v, n, q, o], q) * Sum(s[v, n, q, o2], q), v, n)
)
INPUT_FACTOR_EXPAND = Quantity("input_factor_expand", (i, i2), Sum(a[n, q, i] * a[n, q, i2], n, q) / (N * extent(q)))
INPUT_FACTOR_REDUCE = Quantity(
    "input_factor_reduce", (i, i2), Sum(Sum(a[n, q, i], q) * Sum(a[n, q, i2], q), n) / (N * extent(q) ** 2)
)
INPUT_FACTOR_BACKPACK = Quantity("input_factor_backpack", (i, i2), Sum(a[n, q, i] * a[n, q, i2], n, q) / N)
AVERAGED_FACTOR = Quantity("averaged_factor", (o, o2), Sum(G[q, o, q2, o2], q, q2))
OUTPUT_FACTORS = (OUTPUT_FACTOR_EXPAND, OUTPUT_FACTOR_REDUCE, AVERAGED_FACTOR)
INPUT_FACTORS = (INPUT_FACTOR_EXPAND, INPUT_FACTOR_REDUCE, INPUT_FACTOR_BACKPACK)

#: Number of samples, and the unit u of ∇ℓ_n = u · g_n: N for a mean-reduced loss, 1 for a sum.
SAMPLES, UNIT = Symbol("N"), Symbol("u")
