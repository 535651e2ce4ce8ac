"""torch.nn.LayerNorm, over the last axes."""

from satchel_gen.definitions import Example, Layer, Length, Option, Statement, indices, tensors
from satchel_gen.definitions.standardised import normalised, standardised

n, r, j = indices("n r* j*")
x, y, w, b = tensors("input output weight bias")

LAYER_NORM = Layer(
    name="LayerNorm",
    input=x[n, r, j],
    parameters=(w[j], b[j]),
    statements=(
        *standardised(x[n, r, j], j),
        Statement(y[n, r, j], w[j] * normalised[n, r, j] + b[j]),
    ),
    ranks={j: Length(Option("normalized_shape"))},
    approximation="backpack",
    examples=(
        Example((3,), {"normalized_shape": 3}),
        Example((2, 3), {"normalized_shape": 3}),
        Example((2, 3), {"normalized_shape": 3, "elementwise_affine": False}),
        Example((4, 2, 3), {"normalized_shape": (2, 3), "bias": False}),
    ),
)
