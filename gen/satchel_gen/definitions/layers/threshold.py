"""torch.nn.Threshold. At the kink torch takes the derivative 0."""

from sympy import Piecewise

from satchel_gen.definitions import Example, activation, options, z

threshold, value = options("threshold value")

THRESHOLD = activation(
    "Threshold",
    Piecewise((z, z > threshold), (value, True)),
    examples=(Example((3,), {"threshold": 0.1, "value": -0.3}),),
)
