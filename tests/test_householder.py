"""Softmax's exact factor without its dependent column: S′ S′ᵀ is still the Hessian, to the last digits of small probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from losses import start
from satchel import backpack, extend
from satchel.extensions import KFLR, DiagGGNExact, SqrtGGNExact
from satchel.runtime import curvature
from satchel.runtime.curvature import Start
from satchel.runtime.householder import independent

SHAPES = [(3, 1), (3, 2), (3, 7), (1, 4), (0, 4), (2, 3, 2), (2, 1, 2), (2, 3, 2, 2), (2, 3, 0)]
CRITERIA = {
    "classes": lambda K: nn.CrossEntropyLoss(reduction="sum", ignore_index=0),
    "weights": lambda K: nn.CrossEntropyLoss(reduction="sum", weight=torch.linspace(0.3, 2, K).double()),
    "smoothed": lambda K: nn.CrossEntropyLoss(reduction="mean", label_smoothing=0.3),
}


def target_of(f: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(f.shape[1], (f.shape[0], *f.shape[2:]), generator=generator)


def factors(criterion: nn.Module, f: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The exact factors of a pass: without and with the dependent columns."""
    found: list[Tensor] = []
    exact = Start.exact

    def seen(self: Start, every: bool) -> Tensor:
        found.append(exact(self, every))
        return found[-1]

    monkeypatch.setattr(Start, "exact", seen)
    features: list[tuple[Any, ...]] = [(DiagGGNExact(),), (DiagGGNExact(), SqrtGGNExact())]
    for some in features:
        scores = extend(nn.Linear(1, f.shape[1:].numel()).to(f.dtype))(f.new_zeros(len(f), 1)).view_as(f)
        with backpack(*some):
            extend(criterion)(f + 0 * scores, target_of(f)).backward()
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CRITERIA)
def test_independent_columns_square_to_the_hessian(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every order of the probabilities, and with ties."""
    K, positions = shape[1], torch.Size(shape[2:]).numel()
    f = 3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if len(f):
        f[0] = 0.0
    criterion = CRITERIA[name](K)
    reduced, full = factors(criterion, f, monkeypatch)
    assert len(reduced) == (K - 1) * positions and len(full) == K * positions
    if not f.numel():
        return
    whole = torch.autograd.functional.hessian(lambda f: criterion(f, target_of(f)), f).reshape(f.numel(), -1)
    for S in (reduced, full):
        per_sample = torch.einsum("vni,vnj->nij", S.flatten(2), S.flatten(2))
        torch.testing.assert_close(torch.block_diag(*per_sample), whole)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("confident", range(4))
def test_small_probabilities_keep_their_digits(confident: int, every: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever class is sure: 1 − p has hardly a digit in float32, the factor's product all of them."""
    monkeypatch.setattr(curvature, "_every", lambda plan, demand: every)  # a layer alone would keep all columns
    f = torch.tensor([[-4.0, 0.0, -9.0, 1.0]])
    f[0, confident] = 16.0
    single, double = (
        start(nn.CrossEntropyLoss(), f.to(dtype), torch.tensor([1]), features=(DiagGGNExact(), KFLR()))
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(single.bias.diag_ggn_exact.double(), double.bias.diag_ggn_exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(single.bias.kflr[0].double(), double.bias.kflr[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("at", [80.0, 1e4])
def test_extreme_logits_are_finite(at: float) -> None:
    """Also where all but one probability are zero, and where two are largest."""
    for row in ([at, -at, 0.0], [-at, 0.0, at], [at, at, -at]):
        null = torch.tensor([row]).softmax(1).sqrt()
        S = (torch.eye(3)[:, None] - null.square()) * null.T[:, :, None]
        reduced = independent(S, null, 1)
        assert len(reduced) == 2 and reduced.isfinite().all()
        products = [torch.einsum("vni,vnj->ij", part, part) for part in (reduced, S)]
        torch.testing.assert_close(*products, rtol=1e-6, atol=1e-12)
