"""torch.nn.GroupNorm: normalised over the channels of a group and all positions."""

from sympy import Rational

from satchel_gen.definitions import Example, Layer, Option, Statement, Sum, extent, indices, tensors

n, g, c, s = indices("n g c s*")
x, y, w, b, mean, centred, variance, rstd, normalised = tensors(
    "input output weight bias mean centred variance rstd normalised"
)

GROUP_NORM = Layer(
    name="GroupNorm",
    input=x[n, g, c, s],
    parameters=(w[g, c], b[g, c]),
    statements=(
        Statement(mean[n, g], Sum(x[n, g, c, s], c, s) / (extent(c) * extent(s))),
        Statement(centred[n, g, c, s], x[n, g, c, s] - mean[n, g]),
        Statement(variance[n, g], Sum(centred[n, g, c, s] ** 2, c, s) / (extent(c) * extent(s))),
        Statement(rstd[n, g], (variance[n, g] + Option("eps")) ** Rational(-1, 2)),
        Statement(normalised[n, g, c, s], centred[n, g, c, s] * rstd[n, g]),
        Statement(y[n, g, c, s], w[g, c] * normalised[n, g, c, s] + b[g, c]),
    ),
    joined=((g, c),),
    extents={g: Option("num_groups", integer=True)},
    approximation="backpack",
    examples=(
        Example((4, 3), {"num_groups": 2, "num_channels": 4}),
        Example((4,), {"num_groups": 2, "num_channels": 4}),
        Example((6, 2, 3), {"num_groups": 3, "num_channels": 6, "affine": False}),
        Example((3, 2), {"num_groups": 1, "num_channels": 3}),
    ),
)
