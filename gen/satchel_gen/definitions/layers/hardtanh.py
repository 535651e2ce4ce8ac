"""torch.nn.Hardtanh. At both kinks torch takes the derivative 0."""

from sympy import And, Piecewise

from satchel_gen.definitions import Example, activation, options, z

low, high = options("min_val max_val")

HARDTANH = activation(
    "Hardtanh",
    Piecewise((z, And(z > low, z < high)), (high, z >= high), (low, True)),
    examples=(Example((3,)), Example((2, 3), {"min_val": -0.5, "max_val": 0.2})),
)
