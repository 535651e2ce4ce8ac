"""torch.nn.Softshrink. At both kinks torch takes the derivative 0."""

from sympy import Piecewise

from satchel_gen.definitions import Example, Option, activation, z

lambd = Option("lambd")

SOFTSHRINK = activation(
    "Softshrink",
    Piecewise((z - lambd, z > lambd), (z + lambd, z < -lambd), (0, True)),
    examples=(Example((3,)), Example((2, 3), {"lambd": 0.2})),
)
