"""torch.nn.RReLU in evaluation mode: the mean of the slopes that training draws."""

from sympy import Piecewise

from satchel_gen.definitions import Example, Refused, activation, options, z

lower, upper = options("lower upper")

RRELU = activation(
    "RReLU",
    Piecewise((z, z > 0), ((lower + upper) / 2 * z, True)),
    options={"training": (False,)},
    reasons={"training": "in training mode its slopes are drawn anew for every element. Call eval() on the layer"},
    examples=(Example((3,), training=False), Example((2, 3), {"lower": 0.2, "upper": 0.7}, training=False)),
    refused=(Refused((3,), "training"),),
)
