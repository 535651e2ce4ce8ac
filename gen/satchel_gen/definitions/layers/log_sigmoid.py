"""torch.nn.LogSigmoid."""

from satchel_gen.definitions import activation, softplus, z

LOG_SIGMOID = activation("LogSigmoid", -softplus(-z))
