"""Losses and tensors that curvature cannot start from, or that changed since the forward pass."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import satchel
from conftest import FEATURES
from failures import CURVATURE, FIRST_ORDER, refused, sequence, x, y
from satchel import backpack, extend
from satchel.extensions import (
    BatchGrad,
)

# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", CURVATURE)
@pytest.mark.parametrize("factor", [-1.0, float("nan")])
def test_negative_multiple_of_a_loss(feature: Any, factor: float) -> None:
    model, loss = extend(sequence()), extend(nn.CrossEntropyLoss())
    refused(lambda: factor * loss(model(x), y), model, feature(), ValueError, feature.__name__, "positive")


@pytest.mark.parametrize("feature", FIRST_ORDER)
def test_negative_multiple_is_fine_for_gradients(feature: Any) -> None:
    model, loss = extend(sequence()), extend(nn.CrossEntropyLoss())
    with backpack(feature()):
        (-loss(model(x), y)).backward()
    assert all(hasattr(p, feature.field) for p in model.parameters())


@pytest.mark.parametrize("feature", CURVATURE)
def test_target_that_broadcasts(feature: Any) -> None:
    model, loss = extend(sequence()), extend(nn.MSELoss())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(lambda: loss(model(x), torch.zeros(1, 3)), model, feature(), ValueError, "MSELoss")


@pytest.mark.parametrize("feature", CURVATURE)
def test_loss_without_batch(feature: Any) -> None:
    """CrossEntropyLoss of one vector of logits has no batch axis."""
    model, loss = extend(sequence()), extend(nn.CrossEntropyLoss())
    refused(lambda: loss(model(x)[0], y[0]), model, feature(), ValueError, "CrossEntropyLoss", "batch")


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
def test_overwritten_input(feature: Any) -> None:
    model, loss = extend(sequence(nn.Tanh())), extend(nn.CrossEntropyLoss())
    inputs = x.clone()

    def run() -> Tensor:
        value = loss(model(inputs), y)
        inputs.mul_(2)
        return value

    refused(run, model, feature(), RuntimeError, "place")


@pytest.mark.parametrize("feature", CURVATURE)
def test_overwritten_parameter(feature: Any) -> None:
    model, loss = extend(sequence(nn.Tanh())), extend(nn.CrossEntropyLoss())

    def run() -> Tensor:
        value = loss(model(x), y)
        with torch.no_grad():
            model[2].weight.mul_(2)
        return value

    refused(run, model, feature(), RuntimeError, "place")


def test_overwritten_parameter_whose_shape_alone_is_read() -> None:
    """Before the layer above gets its fields, though autograd itself finds out, below that."""
    model = extend(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)))
    loss = extend(nn.CrossEntropyLoss())

    def run() -> Tensor:
        value = loss(model(torch.randn(5, 1, 3, 3)), y)
        with torch.no_grad():
            model[0].weight.mul_(2)
        return value

    refused(run, model, BatchGrad(), RuntimeError, "place", "Conv2d")


@pytest.mark.parametrize("feature", CURVATURE)
def test_memory_limit(feature: Any) -> None:
    """Below one column of a factor, or KFRA's averaged matrix, which cannot be split: an estimate before anything is computed."""
    model, loss = extend(nn.Sequential(nn.Linear(4, 100), nn.Tanh(), nn.Linear(100, 3))), extend(nn.CrossEntropyLoss())
    with satchel.settings(memory_limit=1000):
        refused(lambda: loss(model(x), y), model, feature(), MemoryError, feature.__name__, "memory_limit", "bytes")


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_shows_as_nan(feature: Any, value: float) -> None:
    """A number that is not one spreads as in autograd; it is no error and hides no sample but its own."""
    model, loss = extend(sequence(nn.Tanh())), extend(nn.MSELoss())
    inputs = x.clone()
    inputs[1, 2] = value
    with backpack(feature()):
        loss(model(inputs), torch.zeros(5, 3)).backward()
    fields = [getattr(p, feature.field) for p in model.parameters()]
    flat = torch.cat([t.flatten() for f in fields for t in (f if isinstance(f, list) else [f])])
    assert not flat.isfinite().all()
    if feature is BatchGrad:
        others = [0, 2, 3, 4]
        assert all(f[others].isfinite().all() for f in fields)
