"""torch.nn.Identity."""

from satchel_gen.definitions import activation, z

IDENTITY = activation("Identity", z)
