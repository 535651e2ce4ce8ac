"""torch.nn.PoissonNLLLoss, with the logarithm of the rate as input, or the rate. `full` adds what does not depend on it."""

from typing import Any

from sympy import Expr, Interval, exp, log, oo

from satchel_gen.definitions import Example, Loss, Option, Poisson, Statement, indices, tensors

n, j = indices("n j*")
f, y, loss = tensors("input target loss")


def poisson(name: str, rate: Expr, log_rate: Expr, **details: Any) -> Loss:
    """The loss in terms of a rate and its logarithm."""
    return Loss(
        name,
        f[n, j],
        y[n, j],
        statements=(Statement(loss[n, j], rate - y[n, j] * log_rate),),
        distribution=Poisson(rate, log_rate),
        module="torch.nn.PoissonNLLLoss",
        domain=Interval(0, oo),
        **details,
    )


POISSON_NLL_LOSS = poisson(
    "PoissonNLLLoss",
    exp(f[n, j]),
    f[n, j],
    when={"log_input": True},
    examples=(Example((3,)), Example((2, 3), {"full": True})),
)
POISSON_NLL_LOSS_RATE = poisson(
    "PoissonNLLLossRate",
    f[n, j],
    log(f[n, j] + Option("eps")),
    support=Interval.open(0, oo),
    examples=(Example((3,), {"log_input": False}), Example((2, 3), {"log_input": False, "eps": 1e-3})),
)
