"""torch.nn.Softplus; above the threshold torch takes the identity."""

from sympy import Piecewise

from satchel_gen.definitions import Example, activation, options, softplus, z

beta, threshold = options("beta threshold")

SOFTPLUS = activation(
    "Softplus",
    Piecewise((z, beta * z > threshold), (softplus(beta * z) / beta, True)),
    examples=(Example((3,)), Example((2, 3), {"beta": 2.5, "threshold": 0.7})),
)
