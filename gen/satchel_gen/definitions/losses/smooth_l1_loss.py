"""torch.nn.SmoothL1Loss: Huber's loss over β, which is the L1 loss where β = 0; the curvature is 1/β where |f − y| < β."""

from typing import Any

from sympy import Abs, Expr, Piecewise

from satchel_gen.definitions import Example, Loss, NoDistribution, Option, Statement, indices, tensors

n, j = indices("n j*")
f, y, off, loss = tensors("input target off loss")
beta, distance = Option("beta"), Abs(off[n, j])


def smooth_l1(name: str, value: Expr, **details: Any) -> Loss:
    """The loss with `value` as a function of f − y."""
    statements = Statement(off[n, j], f[n, j] - y[n, j]), Statement(loss[n, j], value)
    return Loss(
        name,
        f[n, j],
        y[n, j],
        statements,
        distribution=NoDistribution("its targets follow no standard distribution"),
        module="torch.nn.SmoothL1Loss",
        **details,
    )


SMOOTH_L1_LOSS = smooth_l1(
    "SmoothL1Loss",
    Piecewise((off[n, j] ** 2 / (2 * beta), distance < beta), (distance - beta / 2, True)),
    examples=(Example((3,)), Example((2, 3), {"beta": 0.4})),
)
SMOOTH_L1_LOSS_SHARP = smooth_l1(
    "SmoothL1LossSharp", distance, when={"beta": 0.0}, examples=(Example((3,), {"beta": 0.0}),)
)
