"""torch.nn.LayerNorm, over the last axes."""

from sympy import Rational

from satchel_gen.definitions import Example, Layer, Length, Option, Statement, Sum, extent, indices, tensors

n, r, j = indices("n r* j*")
x, y, w, b, mean, centred, variance, rstd, normalised = tensors(
    "input output weight bias mean centred variance rstd normalised"
)

LAYER_NORM = Layer(
    name="LayerNorm",
    input=x[n, r, j],
    parameters=(w[j], b[j]),
    statements=(
        Statement(mean[n, r], Sum(x[n, r, j], j) / extent(j)),
        Statement(centred[n, r, j], x[n, r, j] - mean[n, r]),
        Statement(variance[n, r], Sum(centred[n, r, j] ** 2, j) / extent(j)),
        Statement(rstd[n, r], (variance[n, r] + Option("eps")) ** Rational(-1, 2)),
        Statement(normalised[n, r, j], centred[n, r, j] * rstd[n, r]),
        Statement(y[n, r, j], w[j] * normalised[n, r, j] + b[j]),
    ),
    ranks={j: Length(Option("normalized_shape"))},
    approximation="backpack",
    examples=(
        Example((3,), {"normalized_shape": 3}),
        Example((2, 3), {"normalized_shape": 3}),
        Example((2, 3), {"normalized_shape": 3, "elementwise_affine": False}),
        Example((4, 2, 3), {"normalized_shape": (2, 3), "bias": False}),
    ),
)
