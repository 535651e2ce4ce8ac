"""torch.nn.Hardshrink. At both kinks torch takes the derivative 0."""

from sympy import Or, Piecewise

from satchel_gen.definitions import Example, Option, activation, z

lambd = Option("lambd")

HARDSHRINK = activation(
    "Hardshrink",
    Piecewise((z, Or(z > lambd, z < -lambd)), (0, True)),
    examples=(Example((3,)), Example((2, 3), {"lambd": 0.2})),
)
