"""torch.nn.Hardsigmoid. At both kinks torch takes the derivative 0."""

from sympy import And, Piecewise

from satchel_gen.definitions import activation, z

HARDSIGMOID = activation("Hardsigmoid", Piecewise(((z + 3) / 6, And(z > -3, z < 3)), (1, z >= 3), (0, True)))
