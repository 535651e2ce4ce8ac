"""torch.nn.KLDivLoss: Σ t (log t − f). It is linear in f, so its Hessian is zero; the curvature lies in the log-probabilities."""

from typing import Any

from sympy import Expr, Interval, exp, oo

from satchel_gen.definitions import Example, Loss, NoDistribution, Statement, extent, indices, tensors

n, j = indices("n j*")
f, y, loss = tensors("input target loss")


def kl_div(name: str, probability: Expr, **details: Any) -> Loss:
    """The loss of targets of the given probability, up to their entropy."""
    return Loss(
        name,
        f[n, j],
        y[n, j],
        statements=(Statement(loss[n, j], -probability * f[n, j]),),
        distribution=NoDistribution("which axis holds the outcomes is not known"),
        module="torch.nn.KLDivLoss",
        reductions={"batchmean": extent(n)},
        **details,
    )


KL_DIV_LOSS = kl_div(
    "KLDivLoss", y[n, j], domain=Interval(0, oo), examples=(Example((3,)), Example((2, 3), {"reduction": "batchmean"}))
)
KL_DIV_LOSS_OF_LOGARITHMS = kl_div(
    "KLDivLossOfLogarithms", exp(y[n, j]), when={"log_target": True}, examples=(Example((2, 3), {"log_target": True}),)
)
