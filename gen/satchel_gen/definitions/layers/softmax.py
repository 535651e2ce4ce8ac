"""torch.nn.Softmax, over any axis."""

from sympy import Mod, exp

from satchel_gen.definitions import NDIM, Example, Layer, LogSumExp, Option, Statement, indices, tensors

n, r, k, s = indices("n r* k s*")
x, y, lse = tensors("input output lse")
#: The axes in front of the one that the rows lie along, without the batch.
RANKS = {r: Mod(Option("dim", integer=True), NDIM) - 1}
EXAMPLES = (Example((3,), {"dim": 1}), Example((2, 4, 3), {"dim": -2}), Example((2, 3), {"dim": 1}))

SOFTMAX = Layer(
    name="Softmax",
    input=x[n, r, k, s],
    statements=(
        Statement(lse[n, r, s], LogSumExp(x[n, r, k, s], k)),
        Statement(y[n, r, k, s], exp(x[n, r, k, s] - lse[n, r, s])),
    ),
    ranks=RANKS,
    examples=EXAMPLES,
)
