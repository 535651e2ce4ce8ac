"""torch.nn.Softsign."""

from sympy import Abs

from satchel_gen.definitions import activation, z

SOFTSIGN = activation("Softsign", z / (1 + Abs(z)))
