"""torch.nn.Tanh."""

from sympy import tanh

from satchel_gen.definitions import activation, z

TANH = activation("Tanh", tanh(z))
