"""torch.nn.ReLU. At the kink torch takes the derivative 0."""

from satchel_gen.definitions import activation, z
from sympy import Piecewise

RELU = activation("ReLU", Piecewise((z, z > 0), (0, True)))
