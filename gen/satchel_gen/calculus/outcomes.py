"""The outcomes of a distribution with their probabilities, to take expectations: exact, or a quadrature that is as good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import factorial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..definitions.distributions import Bernoulli, Categorical, Distribution, Laplace, Normal, Poisson
from .terms import CalculusError

Array = NDArray[Any]


def outcomes(
    distribution: Distribution, parameters: Sequence[Array], classes: Sequence[int]
) -> Iterator[tuple[Array, Array]]:
    """(ŷ, p(ŷ)) for every element alone; `classes` is where the parameter of a categorical distribution has its classes."""
    match distribution:
        case Categorical():
            (p,) = parameters
            for k in range(p.shape[classes[0]]):
                yield np.asarray(k), p.take(k, classes[0])
        case Bernoulli():
            p, other = parameters
            yield np.ones_like(p), p
            yield other, 1 - p
        case Normal():
            mean, variance = parameters
            nodes, weights = np.polynomial.hermite_e.hermegauss(20)
            for x, weight in zip(nodes, weights / np.sqrt(2 * np.pi), strict=True):
                yield mean + np.sqrt(variance) * x, np.full_like(mean, weight)
        case Laplace():
            (mean,) = parameters
            nodes, weights = np.polynomial.laguerre.laggauss(20)
            for x, weight in zip(nodes, weights / 2, strict=True):
                yield mean + x, np.full_like(mean, weight)
                yield mean - x, np.full_like(mean, weight)
        case Poisson():
            (rate,) = parameters
            for count in range(60):
                yield np.full_like(rate, count), np.exp(-rate) * rate**count / factorial(count)
        case _:
            raise CalculusError(f"no outcomes are known of {distribution}")
