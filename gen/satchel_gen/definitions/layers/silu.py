"""torch.nn.SiLU."""

from satchel_gen.definitions import activation, sigmoid, z

SILU = activation("SiLU", z * sigmoid(z))
