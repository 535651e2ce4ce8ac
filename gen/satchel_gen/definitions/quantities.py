"""The formulas that features are made of, over a layer's Jacobians. Index groups stand for all axes of one sample:

    y output of the layer, x its input, p a parameter; v columns of a factor, n samples.

Where the parameter's Jacobian contains δ(g, g′) δ(o, o′) · a[n, g, q, i], its indices fall into g, o and i, and q is shared: the
Kronecker structure, found by `calculus.kronecker`. There, s[v, n, q, g, o] is the factor and a[n, g, q, i] the input that it meets.
Several uses of a parameter are one with more outputs: y and q run over those of all uses (`calculus.additive`).
"""

from __future__ import annotations

from sympy import Symbol

from satchel_gen.notation import Centred, Sum, extent, indices, tensors

from .model import Quantity

n, v, e, y, y2, x, x2, p, p2, q, q2, g, o, o2, i, i2 = indices("n v e y y2 x x2 p p2 q q2 g o o2 i i2")
J, H, S, d, G, M, delta, sign, s, a = tensors("J H factor curvature averaged rows delta sign s a")
N = extent(n)

# How curvature passes a layer.
VJP = Quantity("vjp", (v, n, x), Sum(J[n, y, x] * S[v, n, y], y))
DIAGONAL = Quantity("diagonal", (n, x), Sum(J[n, y, x] ** 2 * d[n, y], y))
MEAN_VJP = Quantity("mean_vjp", (e, x), Sum(J[n, y, x] * M[e, y], n, y) / N)
SANDWICH = Quantity("sandwich", (x, x2), Sum(J[n, y, x] * J[n, y2, x2] * G[y, y2], n, y, y2) / N)
RESIDUAL = Quantity("residual", (n, x), Sum(H[n, y, x, x2] * delta[n, y], y))
PASSES = (VJP, DIAGONAL, MEAN_VJP, SANDWICH, RESIDUAL)

# What it leaves on a parameter: the pullback T[v, n, p] = Σ_y J[n, y, p] factor[v, n, y] and its reductions; those of single
# samples first.
T = Sum(J[n, y, p] * S[v, n, y], y)
PER_SAMPLE = Quantity("per_sample", (v, n, p), T)
SAMPLE_SQUARES = Quantity("sample_squares", (n, p), Sum(T**2, v))
SIGNED_SAMPLE_SQUARES = Quantity("signed_sample_squares", (n, p), Sum(sign[v, n] * T**2, v))
SAMPLE_DIAGONAL = Quantity("sample_diagonal", (n, p), Sum(J[n, y, p] ** 2 * d[n, y], y))
SQUARED_NORM = Quantity("squared_norm", (n,), Sum(T**2, v, p))
SUM_OF_SQUARES = Quantity("sum_of_squares", (p,), Sum(T**2, v, n))
SIGNED_SUM_OF_SQUARES = Quantity("signed_sum_of_squares", (p,), Sum(sign[v, n] * T**2, v, n))
DIAGONAL_SUM = Quantity("diagonal_sum", (p,), Sum(J[n, y, p] ** 2 * d[n, y], n, y))
SQUARED_DEVIATIONS = Quantity("squared_deviations", (p,), Sum(Centred(T, n) ** 2, v, n))
PULLBACKS = (
    PER_SAMPLE, SAMPLE_SQUARES, SIGNED_SAMPLE_SQUARES, SAMPLE_DIAGONAL, SQUARED_NORM, SUM_OF_SQUARES, SIGNED_SUM_OF_SQUARES,
    DIAGONAL_SUM, SQUARED_DEVIATIONS,
)  # fmt: skip

# Kronecker factors, for the three ways to treat shared axes (Eschenhagen et al., 2023; "backpack" as in Dangel et al., 2020).
OUTPUT_SUM = Quantity("output_sum", (v, n, g, o), Sum(s[v, n, q, g, o], q), True)
OUTPUT_FACTOR_EXPAND = Quantity(
    "output_factor_expand", (g, o, o2), Sum(s[v, n, q, g, o] * s[v, n, q, g, o2], v, n, q), True
)
OUTPUT_FACTOR_REDUCE = Quantity(
    "output_factor_reduce", (g, o, o2), Sum(OUTPUT_SUM.value * OUTPUT_SUM.value.xreplace({o: o2}), v, n), True
)
INPUT_SUM = Quantity("input_sum", (n, g, i), Sum(a[n, g, q, i], q), True)
INPUT_FACTOR_EXPAND = Quantity(
    "input_factor_expand", (g, i, i2), Sum(a[n, g, q, i] * a[n, g, q, i2], n, q) / (N * extent(q)), True
)
INPUT_FACTOR_REDUCE = Quantity(
    "input_factor_reduce",
    (g, i, i2),
    Sum(INPUT_SUM.value * INPUT_SUM.value.xreplace({i: i2}), n) / (N * extent(q) ** 2),
    True,
)
INPUT_FACTOR_BACKPACK = Quantity(
    "input_factor_backpack", (g, i, i2), Sum(a[n, g, q, i] * a[n, g, q, i2], n, q) / N, True
)
AVERAGED_FACTOR = Quantity("averaged_factor", (g, o, o2), Sum(G[q, g, o, q2, g, o2], q, q2), True)
OUTPUT_FACTORS = (OUTPUT_SUM, OUTPUT_FACTOR_EXPAND, OUTPUT_FACTOR_REDUCE, AVERAGED_FACTOR)
INPUT_FACTORS = (INPUT_SUM, INPUT_FACTOR_EXPAND, INPUT_FACTOR_REDUCE, INPUT_FACTOR_BACKPACK)

# The curvature itself, for a parameter without Kronecker structure: few elements, as a norm's scale or a slope. Of Ḡ it is
# 1/N Σ_n J_nᵀ Ḡ J_n, T of T.
BLOCK = Quantity("block", (p, p2), Sum(T * T.xreplace({p: p2}), v, n), True)

#: Number of samples, and the unit u of ∇ℓ_n = u · g_n: N for a mean-reduced loss, 1 for a sum.
SAMPLES, UNIT = Symbol("N"), Symbol("u")
