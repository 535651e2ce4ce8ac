"""What layers that normalise by moments of the sample itself have in common."""

from sympy import Indexed, Mul, Rational

from ..calculus.derive import Constant, Statement
from ..notation import Index, Option, Sum, extent, tensors

shift, shifted, mean, centred, variance, rstd, normalised = tensors(
    "shift shifted mean centred variance rstd normalised"
)


def standardised(x: Indexed, *over: Index) -> tuple[Statement, ...]:
    """(x − E[x]) / √(Var[x] + ε), the moments over the axes `over` of x.

    Centred twice: the rounding of a large mean, |E[x]| · 6e-8 in float32, is a small mean of what the first centring leaves.
    """
    axes = tuple(x.indices)
    kept = tuple(i for i in axes if i not in over)
    count = Mul(*map(extent, over))
    return (
        Constant(shift[kept], Sum(x, *over) / count),
        Statement(shifted[axes], x - shift[kept]),
        Statement(mean[kept], Sum(shifted[axes], *over) / count),
        Statement(centred[axes], shifted[axes] - mean[kept]),
        Statement(variance[kept], Sum(centred[axes] ** 2, *over) / count),
        Statement(rstd[kept], (variance[kept] + Option("eps")) ** Rational(-1, 2)),
        Statement(normalised[axes], centred[axes] * rstd[kept]),
    )
