"""torch.nn.GroupNorm: normalised over the channels of a group and all positions."""

from satchel_gen.definitions import Example, Layer, Option, Statement, indices, tensors
from satchel_gen.definitions.standardised import normalised, standardised

n, g, c, s = indices("n g c s*")
x, y, w, b = tensors("input output weight bias")

GROUP_NORM = Layer(
    name="GroupNorm",
    input=x[n, g, c, s],
    parameters=(w[g, c], b[g, c]),
    statements=(
        *standardised(x[n, g, c, s], c, s),
        Statement(y[n, g, c, s], w[g, c] * normalised[n, g, c, s] + b[g, c]),
    ),
    joined=((g, c),),
    extents={g: Option("num_groups", integer=True)},
    approximation="backpack",
    examples=(
        Example((4, 3), {"num_groups": 2, "num_channels": 4}),
        Example((4,), {"num_groups": 2, "num_channels": 4}),
        Example((6, 2, 3), {"num_groups": 3, "num_channels": 6, "affine": False}),
        Example((3, 2), {"num_groups": 1, "num_channels": 3}),
    ),
)
