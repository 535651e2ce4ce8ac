"""torch.nn.Mish (Misra, 2019)."""

from sympy import tanh

from satchel_gen.definitions import activation, softplus, z

MISH = activation("Mish", z * tanh(softplus(z)))
