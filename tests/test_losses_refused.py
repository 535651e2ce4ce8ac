"""Losses, weights and targets whose curvature is not defined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Linear

from conftest import Pass
from losses import BY_NAME, SAMPLED, LossCase, start
from satchel import backpack, extend
from satchel.extensions import KFRA, BatchGrad, DiagGGNExact, DiagGGNMC
from satchel_gen.definitions import NoDistribution


def refused(words: tuple[str, ...], loss: nn.Module, f: Tensor, *given: Any, feature: Any = None) -> None:
    model = extend(Linear(1, f.shape[1]).to(f.dtype))
    with torch.no_grad():
        model.bias.copy_(f[0])
        model.weight.zero_()
    with pytest.raises((NotImplementedError, ValueError)) as caught, backpack(feature or DiagGGNExact()):
        extend(loss)(model(f.new_ones(len(f), 1)), *given).backward()
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    assert not hasattr(model.bias, (feature or DiagGGNExact()).field)


@pytest.mark.parametrize("name", [name for name in BY_NAME if isinstance(BY_NAME[name].distribution, NoDistribution)])
@pytest.mark.parametrize("feature", SAMPLED)
def test_no_likelihood(name: str, feature: Any) -> None:
    case = LossCase(name, 0, "mean")
    reason = BY_NAME[name].distribution.reason
    with pytest.raises(
        NotImplementedError, match=rf"{case.module.__name__}.*{feature.__name__}.*{reason}.*DiagGGNExact"
    ):
        Pass(case, torch.float64, "aten", feature())


def test_negative_weights() -> None:
    weight = torch.tensor([1.0, -1.0])
    f, words = torch.zeros(1, 2), ("not convex", "weights")
    y = torch.tensor([[1.0, 0.0]])
    for feature in (DiagGGNExact(), DiagGGNMC(), KFRA()):
        refused(("BCEWithLogitsLoss", *words), nn.BCEWithLogitsLoss(weight=weight), f, y, feature=feature)
    refused(("CrossEntropyLoss", *words), nn.CrossEntropyLoss(weight=weight), f, torch.tensor([1]))
    refused(("NLLLoss", *words), nn.NLLLoss(weight=weight), f, torch.tensor([1]), feature=DiagGGNMC())


def test_negative_counts() -> None:
    """−y log f curves down where y < 0; with the logarithm as input, the target does not enter the curvature."""
    f, y = torch.ones(1, 2), torch.tensor([[-1.0, 2.0]])
    refused(("PoissonNLLLoss", "not convex"), nn.PoissonNLLLoss(log_input=False), f, y)
    start(nn.PoissonNLLLoss(), f, y)


def test_a_variance_that_is_learned() -> None:
    var = torch.ones(1, 2, requires_grad=True)
    words = ("GaussianNLLLoss", "'var'", "gradient", "detached")
    refused(words, nn.GaussianNLLLoss(), torch.zeros(1, 2), torch.ones(1, 2), var)
    model = extend(Linear(1, 2))
    with backpack(BatchGrad()):
        extend(nn.GaussianNLLLoss())(model(torch.ones(1, 1)), torch.ones(1, 2), var).backward()
    assert model.bias.grad_batch is not None


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.NLLLoss])
@pytest.mark.parametrize("ignored", [-100, 1])
def test_targets_that_are_no_class(loss: Any, ignored: int) -> None:
    """torch reads out of bounds, or raises: a class that is ignored is the exception."""
    f = torch.zeros(1, 3).log_softmax(1)
    target = torch.tensor([ignored])
    layer = start(loss(ignore_index=ignored, reduction="sum"), f, target)
    assert (layer.bias.diag_ggn_exact == 0).all()
