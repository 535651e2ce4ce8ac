"""torch.nn.MSELoss, for tensors of any rank: the negative log-likelihood of a normal distribution of variance 1/2."""

from sympy import Rational

from satchel_gen.definitions import Example, Loss, Normal, Statement, indices, tensors

n, j = indices("n j*")
f, y, loss = tensors("input target loss")

MSE_LOSS = Loss(
    name="MSELoss",
    input=f[n, j],
    target=y[n, j],
    statements=(Statement(loss[n, j], (f[n, j] - y[n, j]) ** 2),),
    distribution=Normal(mean=f[n, j], variance=Rational(1, 2)),
    examples=(Example((3,)), Example((2, 3))),
)
