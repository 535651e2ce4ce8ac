"""torch.nn.RMSNorm, over the last axes. Without `eps`, torch takes the machine precision of the input's dtype."""

from sympy import Rational

from satchel_gen.definitions import Example, Layer, Length, Option, Statement, Sum, extent, indices, tensors

n, r, j = indices("n r* j*")
x, y, w, square, rrms, normalised = tensors("input output weight square rrms normalised")

RMS_NORM = Layer(
    name="RMSNorm",
    input=x[n, r, j],
    parameters=(w[j],),
    statements=(
        Statement(square[n, r], Sum(x[n, r, j] ** 2, j) / extent(j)),
        Statement(rrms[n, r], (square[n, r] + Option("eps")) ** Rational(-1, 2)),
        Statement(normalised[n, r, j], x[n, r, j] * rrms[n, r]),
        Statement(y[n, r, j], w[j] * normalised[n, r, j]),
    ),
    absent={"eps": "precision"},
    ranks={j: Length(Option("normalized_shape"))},
    approximation="backpack",
    examples=(
        Example((3,), {"normalized_shape": 3}),
        Example((2, 3), {"normalized_shape": 3, "elementwise_affine": False, "eps": 0.5}),
        Example((4, 2, 3), {"normalized_shape": (2, 3), "eps": 1e-3}),
    ),
)
