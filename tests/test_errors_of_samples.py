"""Samples that mix, and batches that are lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import Wired
from conftest import FEATURES, SECOND_ORDER
from failures import CURVATURE, FIRST_ORDER, refused, sequence, x, y
from satchel import backpack, extend
from satchel.extensions import (
    BatchGrad,
    DiagGGNExact,
)


def tokens_as_samples(m: Any, x: Tensor) -> Tensor:
    return m.b(m.act(m.a(x)).reshape(-1, 6))


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean over samples": lambda h: h - h.mean(0),
    "flip of the batch": lambda h: h.flip(0),
    "permuted batch": lambda h: h[[1, 2, 3, 4, 0]],
    "matrix of samples": lambda h: (h @ h.T) @ h,
    "transposed and back": lambda h: (h @ torch.ones(6, 5)).transpose(0, 1) @ torch.ones(5, 6),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "softmax over samples": lambda h: h * h.softmax(0),
    "cumsum over samples": lambda h: h.cumsum(0),
    "contrastive": lambda h: h + F.normalize(h, dim=0),
}


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("feature", CURVATURE)
def test_samples_mix(name: str, feature: Any) -> None:
    model = extend(Wired(lambda m, x: m.b(MIXES[name](m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    loss = extend(nn.CrossEntropyLoss())
    refused(lambda: loss(model(x), y), model, feature(), (ValueError, NotImplementedError))


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("feature", FIRST_ORDER)
def test_samples_mix_for_individual_gradients(name: str, feature: Any) -> None:
    """Individual gradients do not exist either; δ of a sample would hold parts of the others."""
    model = extend(Wired(lambda m, x: m.b(MIXES[name](m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    loss = extend(nn.CrossEntropyLoss())
    refused(lambda: loss(model(x), y), model, feature(), (ValueError, NotImplementedError))


@pytest.mark.parametrize("feature", FEATURES)
def test_batch_norm_in_training(feature: Any) -> None:
    """Says that individual quantities do not exist, and the remedies."""
    for affine in (True, False):
        model, loss = extend(sequence(nn.BatchNorm1d(6, affine=affine))), extend(nn.CrossEntropyLoss())
        refused(
            lambda: loss(model(x), y),  # noqa: B023
            model,
            feature(),
            (NotImplementedError, ValueError),
            "batch",
            "eval",
            "GroupNorm",
        )


def test_batch_norm_in_evaluation_without_parameters() -> None:
    model, loss = extend(sequence(nn.BatchNorm1d(6, affine=False).eval())), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad(), DiagGGNExact()):
        loss(model(x), y).backward()
    torch.testing.assert_close(model[0].weight.grad_batch.sum(0), model[0].weight.grad)


@pytest.mark.parametrize("feature", FEATURES)
def test_batch_axis_lost(feature: Any) -> None:
    """Positions flattened into the batch: the layers disagree on what a sample is."""
    inputs = torch.randn(5, 2, 4)
    model = extend(Wired(tokens_as_samples, a=nn.Linear(4, 6), act=nn.Tanh(), b=nn.Linear(6, 3)))
    loss = extend(nn.CrossEntropyLoss())
    refused(
        lambda: loss(model(inputs), torch.zeros(10, dtype=torch.long)),
        model,
        feature(),
        ValueError,
        "batch",
        "axis",
        "(10",
    )


@pytest.mark.parametrize("feature", CURVATURE)
def test_mean_over_the_batch_before_the_loss(feature: Any) -> None:
    model = extend(Wired(lambda m, x: m.b(m.a(x)).mean(0, keepdim=True), a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    loss = extend(nn.MSELoss())
    refused(lambda: loss(model(x), torch.zeros(1, 3)), model, feature(), ValueError, "batch")


@pytest.mark.parametrize("feature", [feature for feature in FEATURES if feature.__name__ in SECOND_ORDER])
def test_batch_axis_second(feature: Any) -> None:
    """Second derivatives want the batch first."""
    model = extend(
        Wired(lambda m, x: m.b(m.a(x.transpose(0, 1))).transpose(0, 1), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    )
    loss = extend(nn.MSELoss())
    inputs = torch.randn(5, 2, 4)
    refused(lambda: loss(model(inputs), torch.zeros(5, 2, 3)), model, feature(), ValueError, "batch")
