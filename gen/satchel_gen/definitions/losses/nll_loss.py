"""torch.nn.NLLLoss, over log-probabilities [N, C] and [N, C, d…]. It is linear: its Hessian is zero, the Fisher is diag(p)."""

from satchel_gen.definitions import Categorical, Classes, Equal, Example, Loss, Option, Statement, Sum, indices, tensors

n, k, r = indices("n k r*")
f, y, w, total, loss = tensors("input target weight total loss")
ignored = Option("ignore_index", integer=True)
chosen = Equal(k, y[n, r]) * (1 - Equal(k, ignored)) * w[k]

NLL_LOSS = Loss(
    name="NLLLoss",
    input=f[n, k, r],
    target=y[n, r],
    statements=(
        Statement(total[n, r], Sum(chosen, k)),
        Statement(loss[n, r], -Sum(chosen * f[n, k, r], k)),
    ),
    distribution=Categorical(f[n, k, r], over=k),
    weight=total[n, r],
    operands=(w[k],),
    reductions={"mean": Sum(total[n, r], n, r)},
    domain=Classes(k, ignored),
    examples=(
        Example((3,)),
        Example((3, 2, 2), {"ignore_index": 1}),
        Example((3, 2), {"weight": (0.5, 2.0, 1.5), "ignore_index": 0}),
    ),
)
