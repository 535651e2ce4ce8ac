"""The distributions behind losses. Each states the negative log-likelihood of an outcome, up to what no input moves.

`sampler` names the function of runtime/sampling.py that draws outcomes, given `parameters`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
from sympy import Expr, Indexed, S

from ..formula import render
from ..notation import Equal, Index, Sum


@dataclass(frozen=True)
class Distribution:
    """ŷ ~ p(· | f), independently for every element (or row of classes) of f."""

    sampler: ClassVar[str]
    symbol: ClassVar[str]

    def nll(self, y: Indexed) -> Expr:
        """−log p(y | f)."""
        raise NotImplementedError

    @property
    def parameters(self) -> tuple[Expr, ...]:
        """What it is drawn with."""
        raise NotImplementedError

    def axes(self, of: tuple[Index, ...]) -> tuple[Index, ...]:
        """The axes of an outcome, for an input with the axes `of`."""
        return of

    def __str__(self) -> str:
        return f"{self.symbol}({', '.join(map(render, self.parameters))})"


@dataclass(frozen=True)
class Categorical(Distribution):
    """ŷ is an index `over` the classes; `log_probabilities` is indexed like the loss's input."""

    log_probabilities: Expr
    over: Index
    sampler = "categorical"
    symbol = "Categorical"

    def nll(self, y: Indexed) -> Expr:
        return -Sum(Equal(self.over, y) * self.log_probabilities, self.over)

    @property
    def parameters(self) -> tuple[Expr, ...]:
        return (sympy.exp(self.log_probabilities),)

    def axes(self, of: tuple[Index, ...]) -> tuple[Index, ...]:
        return tuple(i for i in of if i != self.over)


@dataclass(frozen=True)
class Normal(Distribution):
    mean: Expr
    variance: Expr
    sampler = "normal"
    symbol = "N"

    def nll(self, y: Indexed) -> Expr:
        return (y - self.mean) ** 2 / (2 * self.variance)

    @property
    def parameters(self) -> tuple[Expr, ...]:
        return (self.mean, self.variance)


@dataclass(frozen=True)
class Laplace(Distribution):
    """Scale 1."""

    mean: Expr
    sampler = "laplace"
    symbol = "Laplace"

    def nll(self, y: Indexed) -> Expr:
        return sympy.Abs(self.mean - y)

    @property
    def parameters(self) -> tuple[Expr, ...]:
        return (self.mean,)


@dataclass(frozen=True)
class Bernoulli(Distribution):
    """ŷ = 1 with `probability`, else `other`; −log p of both are stated, because each has a stable form of its own."""

    probability: Expr
    nll_of_one: Expr
    nll_of_other: Expr
    other: Expr = S.Zero
    sampler = "bernoulli"
    symbol = "Bernoulli"

    def nll(self, y: Indexed) -> Expr:
        one = (y - self.other) / (1 - self.other)
        return one * self.nll_of_one + (1 - one) * self.nll_of_other

    @property
    def parameters(self) -> tuple[Expr, ...]:
        return (self.probability, self.other)


@dataclass(frozen=True)
class Poisson(Distribution):
    rate: Expr
    log_rate: Expr
    sampler = "poisson"
    symbol = "Poisson"

    def nll(self, y: Indexed) -> Expr:
        return self.rate - y * self.log_rate

    @property
    def parameters(self) -> tuple[Expr, ...]:
        return (self.rate,)


@dataclass(frozen=True)
class NoDistribution:
    """The loss is not the negative log-likelihood of a distribution that can be drawn from, and why."""

    reason: str
