"""torch.nn.BCELoss: Bernoulli with probabilities f. Below 1e-12 the logarithm continues as a line, as torch's gradient does."""

from sympy import Expr, Interval, Piecewise, Rational, log

from satchel_gen.definitions import Bernoulli, Example, Loss, Statement, indices, tensors

n, j = indices("n j*")
f, y, w, rest, loss = tensors("input target weight rest loss")
tiny = Rational(1, 10**12)


def nll_of(p: Expr, complement: Expr) -> Expr:
    """−log p, constant where p = 1."""
    return Piecewise((1 - p / tiny - log(tiny), p < tiny), (-log(p), complement > 0), (0, True))


of_one, of_zero = nll_of(f[n, j], rest[n, j]), nll_of(rest[n, j], f[n, j])

BCE_LOSS = Loss(
    name="BCELoss",
    input=f[n, j],
    target=y[n, j],
    statements=(
        Statement(rest[n, j], 1 - f[n, j]),
        Statement(loss[n, j], w[n, j] * (y[n, j] * of_one + (1 - y[n, j]) * of_zero)),
    ),
    distribution=Bernoulli(f[n, j], of_one, of_zero),
    weight=w[n, j],
    operands=(w[n, j],),
    support=Interval.open(0, 1),
    domain=Interval(0, 1),
    examples=(Example((3,)), Example((2, 3), {"weight": (0.5, 2.0, 1.5)})),
)
