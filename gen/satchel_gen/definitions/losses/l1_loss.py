"""torch.nn.L1Loss, of a Laplace distribution. Its Hessian is zero: the GGN is zero, and only the Fisher has curvature."""

from sympy import Abs

from satchel_gen.definitions import Example, Laplace, Loss, Statement, indices, tensors

n, j = indices("n j*")
f, y, loss = tensors("input target loss")

L1_LOSS = Loss(
    name="L1Loss",
    input=f[n, j],
    target=y[n, j],
    statements=(Statement(loss[n, j], Abs(f[n, j] - y[n, j])),),
    distribution=Laplace(mean=f[n, j]),
    examples=(Example((3,)), Example((2, 3))),
)
