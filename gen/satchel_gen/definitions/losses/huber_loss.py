"""torch.nn.HuberLoss (Huber, 1964): a parabola that continues as a line where |f − y| ≥ δ, and has no curvature there."""

from sympy import Abs, Piecewise

from satchel_gen.definitions import Example, Loss, NoDistribution, Option, Statement, indices, tensors

n, j = indices("n j*")
f, y, off, loss = tensors("input target off loss")
delta = Option("delta")
parabola, line = off[n, j] ** 2 / 2, delta * (Abs(off[n, j]) - delta / 2)

HUBER_LOSS = Loss(
    name="HuberLoss",
    input=f[n, j],
    target=y[n, j],
    statements=(
        Statement(off[n, j], f[n, j] - y[n, j]),
        Statement(loss[n, j], Piecewise((parabola, Abs(off[n, j]) < delta), (line, True))),
    ),
    distribution=NoDistribution("its targets follow no standard distribution"),
    examples=(Example((3,)), Example((2, 3), {"delta": 0.5})),
)
