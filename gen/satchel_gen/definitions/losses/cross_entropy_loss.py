"""torch.nn.CrossEntropyLoss with class indices, over [N, C] and [N, C, d…]: −log softmax(f)[y]."""

from sympy import Integer, exp

from satchel_gen.definitions import (
    Categorical,
    Equal,
    Example,
    LogSumExp,
    Loss,
    Refused,
    Statement,
    Sum,
    extent,
    indices,
    tensors,
)

n, k, r = indices("n k r*")
f, y, lse, loss = tensors("input target lse loss")

CROSS_ENTROPY_LOSS = Loss(
    name="CrossEntropyLoss",
    input=f[n, k, r],
    target=y[n, r],
    statements=(
        Statement(lse[n, r], LogSumExp(f[n, k, r], k)),
        Statement(loss[n, r], lse[n, r] - Sum(Equal(k, y[n, r]) * f[n, k, r], k)),
    ),
    distribution=Categorical(probabilities=exp(f[n, k, r] - lse[n, r]), over=k),
    domain=(Integer(0), extent(k)),
    options={"reduction": ("mean", "sum"), "weight": (None,), "ignore_index": (-100,), "label_smoothing": (0.0,)},
    examples=(Example((3,)), Example((3, 2)), Example((3, 2, 2))),
    refused=(
        Refused((3,), "label_smoothing", {"label_smoothing": 0.1}),
        Refused((3,), "ignore_index", {"ignore_index": 0}),
    ),
)
