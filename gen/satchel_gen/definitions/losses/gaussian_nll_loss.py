"""torch.nn.GaussianNLLLoss: a normal distribution whose variance is the third argument, and constant. `full` adds a constant."""

from sympy import Piecewise

from satchel_gen.definitions import Example, Loss, Normal, Option, Statement, indices, tensors

n, j = indices("n j*")
f, y, var, variance, loss = tensors("input target var variance loss")
eps = Option("eps")

GAUSSIAN_NLL_LOSS = Loss(
    name="GaussianNLLLoss",
    input=f[n, j],
    target=y[n, j],
    statements=(
        Statement(variance[n, j], Piecewise((eps, var[n, j] < eps), (var[n, j], True))),
        Statement(loss[n, j], (f[n, j] - y[n, j]) ** 2 / (2 * variance[n, j])),
    ),
    distribution=Normal(mean=f[n, j], variance=variance[n, j]),
    operands=(var[n, j],),
    arguments=("var",),
    examples=(Example((3,)), Example((2, 3), {"eps": 0.5, "full": True})),
)
