"""torch.nn.Hardswish."""

from sympy import And, Piecewise

from satchel_gen.definitions import activation, z

HARDSWISH = activation("Hardswish", Piecewise((z * (z + 3) / 6, And(z > -3, z < 3)), (z, z >= 3), (0, True)))
