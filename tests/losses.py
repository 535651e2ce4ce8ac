"""Every example of every loss, on a small network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.nn import Linear, Sigmoid, Softplus, Tanh

from cases import Network, Wired
from conftest import DEFINITIONS
from reference import Reference, contributions
from satchel import backpack, extend
from satchel.extensions import KFAC, KFLR, KFRA, BatchGrad, DiagGGNExact, DiagGGNMC, DiagHessian
from satchel_gen.definitions import Classes, NoDistribution

EXACT = (BatchGrad, DiagGGNExact, DiagHessian, KFLR, KFRA)
SAMPLED = (DiagGGNMC, KFAC)
BY_NAME = {definition.name: definition for definition in DEFINITIONS.losses}


@dataclass(frozen=True)
class LossCase:
    """One example of one definition."""

    name: str
    example: int
    reduction: str
    batch: int = 5

    @property
    def definition(self) -> Any:
        return BY_NAME[self.name]

    @property
    def module(self) -> type[nn.Module]:
        return getattr(nn, self.definition.module.rpartition(".")[2])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.definition.examples[self.example].shape

    def criterion(self) -> nn.Module:
        given = {"reduction": self.reduction, **self.definition.examples[self.example].arguments}
        return self.module(**{k: torch.tensor(v) if isinstance(v, tuple) else v for k, v in given.items()})

    @property
    def network(self) -> Network:
        shape, size = self.shape, torch.Size(self.shape).numel()
        lower, upper = self.definition.support.inf, self.definition.support.sup
        link = Sigmoid if upper.is_finite else Softplus if lower.is_finite else nn.Identity

        def wire(m: Any, x: Tensor) -> Tensor:
            return m.link(m.head(m.act(m.first(x))).view(-1, *shape))

        def build() -> nn.Module:
            return Wired(wire, first=Linear(4, 6), act=Tanh(), head=Linear(6, size), link=link())

        return Network(self.name, build, (self.batch, 4))

    def target(self) -> Tensor:
        """Where the definition says that targets lie; one of them ignored, where that is possible."""
        generator = torch.Generator().manual_seed(3)
        domain = self.definition.domain
        if isinstance(domain, Classes):
            target = torch.randint(self.shape[0], (self.batch, *self.shape[1:]), generator=generator)
            if target.numel() > 1:
                target.view(-1)[0] = self.criterion().ignore_index
            return target
        if isinstance(domain, sympy.FiniteSet):
            return torch.randint(0, 2, (self.batch, *self.shape), generator=generator) * 2.0 - 1
        drawn = torch.randn(self.batch, *self.shape, generator=generator)
        if domain.inf.is_finite:
            return drawn.softmax(1) if domain.sup.is_finite else drawn.exp()
        return drawn

    def more(self) -> tuple[Tensor, ...]:
        shape = (self.batch, *self.shape)
        return tuple(torch.linspace(0.3, 1.7, torch.Size(shape).numel()).view(shape) for _ in self.definition.arguments)

    def arranged(self, output: Tensor) -> Tensor:
        return output

    def contributions(self, output: Tensor) -> Tensor:
        return contributions(self.criterion(), self.target(), more=self.more())(output)

    def unit(self) -> float:
        return 1.0 if self.reduction == "sum" else float(self.batch)

    def reference(self) -> Reference:
        return _reference(self)


@cache
def _reference(case: LossCase) -> Reference:
    return Reference(case.network.model(), [case.network.input()], [case.contributions], case.unit())


def label(case: LossCase) -> str:
    return f"{case.name}-{case.example}-{case.reduction}"


CASES = [
    LossCase(name, k, reduction)
    for name, definition in BY_NAME.items()
    for k in range(len(definition.examples))
    for reduction in ("mean", "sum")
]
CASES += [LossCase(name, 0, "mean", batch=1) for name in BY_NAME]
all_cases = pytest.mark.parametrize("case", CASES, ids=[label(case) for case in CASES])
LIKELIHOODS = [case for case in CASES if not isinstance(case.definition.distribution, NoDistribution)]
likelihoods = pytest.mark.parametrize("case", LIKELIHOODS, ids=[label(case) for case in LIKELIHOODS])


def expected(case: LossCase, feature: type, **options: Any) -> dict[str, Any]:
    reference = case.reference()
    return {name: reference.field(feature.__name__, name, **options) for name in reference.parameters}


def start(
    module: nn.Module, f: Tensor, *given: Tensor, features: tuple[Any, ...] = (DiagGGNExact(), DiagHessian())
) -> Any:
    """A layer that adds a bias to logits `f` [N, F]: what the loss sends to it."""
    layer: Any = extend(Linear(1, f.shape[1]).to(f.dtype))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(f[0])
    with backpack(*features):
        extend(module)(layer(f.new_ones(len(f), 1)), *given).backward()
    return layer
