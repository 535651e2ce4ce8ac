"""torch.nn.ReLU. At the kink torch takes the derivative 0."""

from sympy import Piecewise

from satchel_gen.definitions import activation, z

RELU = activation("ReLU", Piecewise((z, z > 0), (0, True)))
