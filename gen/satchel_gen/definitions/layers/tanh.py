"""torch.nn.Tanh."""

from satchel_gen.definitions import activation, z
from sympy import tanh

TANH = activation("Tanh", tanh(z))
