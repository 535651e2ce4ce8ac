"""torch.nn.CrossEntropyLoss over logits [N, C] and [N, C, d…]: −Σ_k t_k log softmax(f)_k, t from classes or probabilities."""

from typing import Any

from sympy import Expr, Indexed, Integer, Interval

from satchel_gen.definitions import (  # isort: skip
    Categorical, Classes, Equal, Example, LogSumExp, Loss, Option, Statement, Sum, extent, indices, tensors,
)  # fmt: skip

n, k, r = indices("n k r*")
f, y, w, lse, counted, total, loss = tensors("input target weight lse counted total loss")
ignored, smoothing = Option("ignore_index", integer=True), Option("label_smoothing")


def cross_entropy(name: str, target: Indexed, t: Expr, *before: Statement, **details: Any) -> Loss:
    """The loss of weighted targets `t`, which sum to `total` over the classes."""
    sums = Statement(lse[n, r], LogSumExp(f[n, k, r], k)), *before, Statement(total[n, r], Sum(t, k))
    value = Statement(loss[n, r], total[n, r] * lse[n, r] - Sum(t * f[n, k, r], k))
    details |= {"weight": total[n, r], "module": "torch.nn.CrossEntropyLoss"}
    return Loss(name, f[n, k, r], target, (*sums, value), Categorical(f[n, k, r] - lse[n, r], over=k), **details)


one, EXAMPLE = Equal(k, y[n, r]), {"weight": (0.5, 2.0, 1.5), "label_smoothing": 0.2}
CROSS_ENTROPY_LOSS = cross_entropy(
    "CrossEntropyLoss", y[n, r], one, when={"weight": None, "label_smoothing": 0.0, "ignore_index": -100},
    reductions={"mean": Sum(total[n, r], n, r)}, domain=Classes(k, Integer(-100)), examples=tuple(map(Example, [(3,), (3, 2, 2)])),
)  # fmt: skip
kept = one * (1 - Equal(k, ignored))
smooth = counted[n, r] * ((1 - smoothing) * one + smoothing / extent(k)) * w[k]
CROSS_ENTROPY_LOSS_WEIGHTED = cross_entropy(
    "CrossEntropyLossWeighted", y[n, r], smooth, Statement(counted[n, r], Sum(kept, k)), operands=(w[k],),
    reductions={"mean": Sum(kept * w[k], n, k, r)}, domain=Classes(k, ignored),
    examples=(Example((3,), EXAMPLE), Example((3, 2), {"ignore_index": 0, **EXAMPLE}), Example((3, 2, 2), {"ignore_index": 1})),
)  # fmt: skip
CROSS_ENTROPY_LOSS_PROBABILITIES = cross_entropy(
    "CrossEntropyLossProbabilities", y[n, k, r], ((1 - smoothing) * y[n, k, r] + smoothing / extent(k)) * w[k],
    operands=(w[k],), domain=Interval(0, 1), examples=(Example((3,)), Example((3, 2), EXAMPLE)),
)  # fmt: skip
