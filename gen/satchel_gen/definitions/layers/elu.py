"""torch.nn.ELU."""

from sympy import Piecewise, exp

from satchel_gen.definitions import Example, Option, activation, z

ELU = activation(
    "ELU",
    Piecewise((z, z > 0), (Option("alpha") * (exp(z) - 1), True)),
    examples=(Example((3,)), Example((2, 3), {"alpha": 0.5})),
)
