"""torch.nn.ReLU6. At both kinks torch takes the derivative 0."""

from sympy import And, Piecewise

from satchel_gen.definitions import activation, z

RELU6 = activation("ReLU6", Piecewise((z, And(z > 0, z < 6)), (6, z >= 6), (0, True)))
