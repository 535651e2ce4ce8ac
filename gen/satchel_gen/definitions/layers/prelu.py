"""torch.nn.PReLU, with a slope for each channel or one for all. At the kink torch takes the slope of the negative side."""

from typing import Any

from sympy import Integer, Piecewise

from satchel_gen.definitions import Example, Index, Layer, Statement, indices, tensors

n, channel, no_axis, s = indices("n c c* s*")
x, y, w = tensors("input output weight")


def prelu(name: str, c: Index, **details: Any) -> Layer:
    """The layer with its slopes along `c`."""
    value = Piecewise((x[n, c, s], x[n, c, s] > 0), (w[c] * x[n, c, s], True))
    return Layer(
        name, x[n, c, s], (Statement(y[n, c, s], value),), parameters=(w[c],), module="torch.nn.PReLU", **details
    )


PRELU = prelu(
    "PReLU",
    channel,
    examples=(Example((3,), {"num_parameters": 3}), Example((3, 2, 4), {"num_parameters": 3})),
)
#: One slope stands along an axis that the input does not have.
PRELU_SHARED = prelu(
    "PReLUShared",
    no_axis,
    when={"num_parameters": 1},
    ranks={no_axis: Integer(0)},
    examples=(Example((2, 3)), Example((3,), {"init": 0.4})),
)
