"""An optimizer that preconditions with the Kronecker factors that `KFAC()` leaves on every parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class KFACOptimizer(Optimizer):
    """θ ← θ − lr·v with v ← momentum·v + B̂⁻¹ G Â⁻¹ (a bias: B̂⁻¹ g).

    `loss.backward()` must run inside `backpack(KFAC())`, which leaves `weight.kfac = [B, A]` and `bias.kfac = [B]`,
    with the curvature approximated by B ⊗ A. Â and B̂ are running averages of the factors, damped by the split of
    Martens and Grosse, Â = A + π√λ·I and B̂ = B + √λ/π·I with π² = (tr A / dim A) / (tr B / dim B): each is damped
    relative to its own scale.

    Source: Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015,
    sections 5 and 6.3.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        damping: float = 1e-2,
        momentum: float = 0.9,
        decay: float = 0.95,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "damping": damping, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise NotImplementedError("the factors belong to one backward pass: call loss.backward() yourself")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                factors = self._running_average(state, parameter.kfac, group["decay"])
                direction = precondition(parameter.grad, factors, group["damping"])
                velocity = state.setdefault("velocity", torch.zeros_like(parameter))
                velocity.mul_(group["momentum"]).add_(direction)
                parameter.sub_(velocity, alpha=group["lr"])

    @staticmethod
    def _running_average(state: dict[str, Any], factors: list[Tensor], decay: float) -> list[Tensor]:
        """Exponential average whose weights sum to one from the first step on, as Adam's bias correction does."""
        state["step"] = state.get("step", 0) + 1
        averages = state.setdefault("factors", [torch.zeros_like(factor) for factor in factors])
        for average, factor in zip(averages, factors, strict=True):
            average.lerp_(factor, (1 - decay) / (1 - decay ** state["step"]))
        return list(averages)


def precondition(gradient: Tensor, factors: list[Tensor], damping: float) -> Tensor:
    """B̂⁻¹ G Â⁻¹ for a weight ([B, A]), (B + λI)⁻¹ g for a bias ([B])."""
    if len(factors) == 1:
        return _solve(factors[0], damping, gradient.unsqueeze(1)).squeeze(1)
    B, A = factors
    pi = (A.diagonal().mean() / B.diagonal().mean()).sqrt()
    left = _solve(B, damping**0.5 / pi, gradient)
    return _solve(A, damping**0.5 * pi, left.T).T


def _solve(factor: Tensor, damping: float | Tensor, right: Tensor) -> Tensor:
    """(factor + damping·I)⁻¹ right, by Cholesky."""
    damped = factor + damping * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(damped))
