"""What layers that normalise by moments of the sample itself have in common."""

from sympy import Indexed, Mul, Rational

from ..calculus.derive import Statement
from ..notation import Index, Option, Sum, extent, tensors

mean, centred, variance, rstd, normalised = tensors("mean centred variance rstd normalised")


def standardised(x: Indexed, *over: Index) -> tuple[Statement, ...]:
    """(x − E[x]) / √(Var[x] + ε), the moments over the axes `over` of x."""
    axes = tuple(x.indices)
    kept = tuple(i for i in axes if i not in over)
    count = Mul(*map(extent, over))
    return (
        Statement(mean[kept], Sum(x, *over) / count),
        Statement(centred[axes], x - mean[kept]),
        Statement(variance[kept], Sum(centred[axes] ** 2, *over) / count),
        Statement(rstd[kept], (variance[kept] + Option("eps")) ** Rational(-1, 2)),
        Statement(normalised[axes], centred[axes] * rstd[kept]),
    )
