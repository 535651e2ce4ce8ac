"""torch.nn.SoftMarginLoss: logistic regression with targets ±1."""

from sympy import FiniteSet, Integer

from satchel_gen.definitions import Bernoulli, Example, Loss, Statement, indices, sigmoid, softplus, tensors

n, j = indices("n j*")
f, y, loss = tensors("input target loss")

SOFT_MARGIN_LOSS = Loss(
    name="SoftMarginLoss",
    input=f[n, j],
    target=y[n, j],
    statements=(Statement(loss[n, j], softplus(-y[n, j] * f[n, j])),),
    distribution=Bernoulli(sigmoid(f[n, j]), softplus(-f[n, j]), softplus(f[n, j]), other=Integer(-1)),
    domain=FiniteSet(-1, 1),
    examples=(Example((3,)), Example((2, 3))),
)
