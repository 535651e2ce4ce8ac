"""torch.nn.Tanhshrink."""

from sympy import tanh

from satchel_gen.definitions import activation, z

TANHSHRINK = activation("Tanhshrink", z - tanh(z))
