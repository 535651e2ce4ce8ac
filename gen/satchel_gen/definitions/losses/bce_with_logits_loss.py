"""torch.nn.BCEWithLogitsLoss: Bernoulli with logits f, targets in [0, 1], a weight per element and one for y = 1."""

from sympy import Interval

from satchel_gen.definitions import Bernoulli, Example, Loss, Statement, indices, sigmoid, softplus, tensors

n, j = indices("n j*")
f, y, w, positive, loss = tensors("input target weight pos_weight loss")
of_one, of_zero = softplus(-f[n, j]), softplus(f[n, j])
one, zero = positive[n, j] * y[n, j], 1 - y[n, j]

BCE_WITH_LOGITS_LOSS = Loss(
    name="BCEWithLogitsLoss",
    input=f[n, j],
    target=y[n, j],
    statements=(Statement(loss[n, j], w[n, j] * (one * of_one + zero * of_zero)),),
    distribution=Bernoulli(sigmoid(f[n, j]), of_one, of_zero),
    weight=w[n, j] * (one + zero),
    operands=(w[n, j], positive[n, j]),
    domain=Interval(0, 1),
    examples=(
        Example((3,)),
        Example((2, 3), {"weight": (0.5, 2.0, 1.5), "pos_weight": (3.0, 0.25, 1.0)}),
        Example((3,), {"pos_weight": (4.0,)}),
    ),
)
