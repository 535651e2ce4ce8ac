"""torch.nn.LeakyReLU. At the kink torch takes the slope of the negative side."""

from sympy import Piecewise

from satchel_gen.definitions import Example, Option, activation, z

LEAKY_RELU = activation(
    "LeakyReLU",
    Piecewise((z, z > 0), (Option("negative_slope") * z, True)),
    examples=(Example((3,)), Example((2, 3), {"negative_slope": 0.3})),
)
