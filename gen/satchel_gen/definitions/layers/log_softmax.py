"""torch.nn.LogSoftmax, over any axis."""

from satchel_gen.definitions import Layer, LogSumExp, Statement
from satchel_gen.definitions.layers.softmax import EXAMPLES, RANKS, k, lse, n, r, s, x, y

LOG_SOFTMAX = Layer(
    name="LogSoftmax",
    input=x[n, r, k, s],
    statements=(
        Statement(lse[n, r, s], LogSumExp(x[n, r, k, s], k)),
        Statement(y[n, r, k, s], x[n, r, k, s] - lse[n, r, s]),
    ),
    ranks=RANKS,
    examples=EXAMPLES,
)
