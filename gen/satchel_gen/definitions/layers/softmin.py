"""torch.nn.Softmin, over any axis: the softmax of −x."""

from sympy import exp

from satchel_gen.definitions import Layer, LogSumExp, Statement, tensors
from satchel_gen.definitions.layers.softmax import EXAMPLES, RANKS, k, lse, n, r, s, x, y

(negative,) = tensors("negative")

SOFTMIN = Layer(
    name="Softmin",
    input=x[n, r, k, s],
    statements=(
        Statement(negative[n, r, k, s], -x[n, r, k, s]),
        Statement(lse[n, r, s], LogSumExp(negative[n, r, k, s], k)),
        Statement(y[n, r, k, s], exp(negative[n, r, k, s] - lse[n, r, s])),
    ),
    ranks=RANKS,
    examples=EXAMPLES,
)
