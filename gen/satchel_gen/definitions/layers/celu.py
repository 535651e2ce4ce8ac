"""torch.nn.CELU."""

from sympy import Piecewise, exp

from satchel_gen.definitions import Example, Option, activation, z

alpha = Option("alpha")

CELU = activation(
    "CELU",
    Piecewise((z, z > 0), (alpha * (exp(z / alpha) - 1), True)),
    examples=(Example((3,)), Example((2, 3), {"alpha": 0.5})),
)
