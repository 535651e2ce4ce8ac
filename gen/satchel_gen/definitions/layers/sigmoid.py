"""torch.nn.Sigmoid."""

from satchel_gen.definitions import activation, sigmoid, z

SIGMOID = activation("Sigmoid", sigmoid(z))
