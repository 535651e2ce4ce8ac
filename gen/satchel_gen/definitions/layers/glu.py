"""torch.nn.GLU (Dauphin et al., 2017), over any axis: its first half, gated by the sigmoid of its second."""

from satchel_gen.definitions import Equal, Example, Layer, Statement, Sum, indices, sigmoid, tensors
from satchel_gen.definitions.layers.softmax import RANKS

n, r, half, k, s = indices("n r* half k s*")
x, y, value, gate = tensors("input output value gate")

GLU = Layer(
    name="GLU",
    input=x[n, r, half, k, s],
    statements=(
        Statement(value[n, r, k, s], Sum(Equal(half, 0) * x[n, r, half, k, s], half)),
        Statement(gate[n, r, k, s], Sum(Equal(half, 1) * x[n, r, half, k, s], half)),
        Statement(y[n, r, k, s], value[n, r, k, s] * sigmoid(gate[n, r, k, s])),
    ),
    joined=((half, k),),
    extents={half: 2},
    ranks=RANKS,
    examples=(Example((6,)), Example((2, 3), {"dim": 1}), Example((4, 2, 3), {"dim": -3})),
)
