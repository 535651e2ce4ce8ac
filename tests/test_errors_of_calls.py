"""Every way to call wrongly: the message names where, what and the remedy, and earlier fields stay as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import FEATURES
from failures import CURVATURE, FIRST_ORDER, refused, sequence, x, y
from satchel import backpack, disable, extend
from satchel.extensions import (
    KFLR,
    BatchGrad,
    SqrtGGNExact,
    SqrtGGNMC,
)
from satchel.runtime import curvature


@pytest.mark.parametrize("given", [BatchGrad, nn.Linear(1, 1), "BatchGrad", None])
def test_not_an_extension(given: Any) -> None:
    with pytest.raises(ValueError) as raised:
        backpack(KFLR(), given)
    name = given.__name__ if isinstance(given, type) else type(given).__name__
    assert name in str(raised.value)
    if isinstance(given, type):
        assert "BatchGrad()" in str(raised.value), "the remedy"


@pytest.mark.parametrize("given", [nn.Linear, F.cross_entropy, None, torch.zeros(1)])
def test_not_a_module(given: Any) -> None:
    with pytest.raises(TypeError, match="Module"):
        extend(given)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("how", ["not extended", "disabled"])
def test_nothing_reached(feature: Any, how: str) -> None:
    model, loss = sequence(nn.ReLU()), nn.CrossEntropyLoss()
    if how == "disabled":
        model, loss = extend(model), extend(loss)
    with pytest.raises(RuntimeError, match=f"{feature.__name__}.*extend"), backpack(feature()):
        with disable():
            value = loss(model(x), y)
        value.backward()


@pytest.mark.parametrize("feature", CURVATURE)
@pytest.mark.parametrize("how", ["module", "functional", "sum"])
def test_loss_not_extended(feature: Any, how: str) -> None:
    model = extend(sequence(nn.ReLU()))
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "module": nn.CrossEntropyLoss(),
        "functional": F.cross_entropy,
        "sum": lambda f, y: f[:, 0].sum(),
    }
    message = refused(
        lambda: losses[how](model(x), y), model, feature(), RuntimeError, feature.__name__, "loss", "extend", "Linear"
    )
    assert "weight" in message or "bias" in message


def on_the_input(f: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return loss(f, y) + f.square().mean()


def before_the_loss(f: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What the loss sends arrives first: autograd may add to it in place."""
    return f.square().mean() + loss(f, y)


def on_what_the_input_is_a_view_of(f: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return loss(f.view(len(y), -1), y) + f.square().mean()


def on_a_view_that_the_loss_takes(f: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    view = f.view(len(y), -1)
    return loss(view, y) + view.square().mean()


def by_a_hook(f: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    f.register_hook(lambda delta: 2 * delta)
    return loss(f, y)


@pytest.mark.parametrize("feature", CURVATURE)
@pytest.mark.parametrize(
    "more",
    [on_the_input, before_the_loss, on_what_the_input_is_a_view_of, on_a_view_that_the_loss_takes, by_a_hook],
)
def test_one_of_two_losses_not_extended(feature: Any, more: Callable[..., Tensor]) -> None:
    """A part of the curvature would be missing in silence."""
    model, loss = extend(sequence(nn.Tanh())), extend(nn.CrossEntropyLoss())
    refused(lambda: more(model(x), loss), model, feature(), (RuntimeError, NotImplementedError), feature.__name__)


@pytest.mark.parametrize("feature", CURVATURE)
@pytest.mark.parametrize("losses", [1, 2])
@pytest.mark.parametrize("curved", [False, True])
def test_what_losses_send_is_not_computed_again(
    feature: Any, losses: int, curved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One loss alone is known by the tensor that it sends; residuals need it where a step is curved."""
    computed: list[bool] = []
    gradient = curvature.Start.__dict__["gradient"]
    monkeypatch.setattr(
        curvature.Start, "gradient", property(lambda start: computed.append(True) or gradient.compute(start))
    )
    model, loss = extend(sequence(nn.Tanh() if curved else nn.ReLU())), extend(nn.CrossEntropyLoss())
    with backpack(feature()):
        f = model(x)
        sum(loss(f, y) for _ in range(losses)).backward()
    residual = curved and feature.__name__.endswith("DiagHessian")
    assert len(computed) == losses * ((losses > 1) + residual)


def test_non_scalar() -> None:
    model = extend(sequence())
    with pytest.raises(RuntimeError, match="scalar"), backpack(BatchGrad()):
        model(x).backward()


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("how", ["functional", "different reductions"])
def test_table5_needs_the_reduction(feature: Any, how: str) -> None:
    model = extend(sequence())
    ce, summed = extend(nn.CrossEntropyLoss()), extend(nn.CrossEntropyLoss(reduction="sum"))

    def total() -> Tensor:
        f = model(x)
        return F.cross_entropy(f, y) if how == "functional" else ce(f, y) + summed(f, y)

    error = refused(total, model, feature(scaling="table5"), RuntimeError, feature.__name__, "backpack")
    if feature in FIRST_ORDER:
        assert "table5" in error and "reduction" in error


@pytest.mark.parametrize("feature", CURVATURE)
def test_no_sweep_comes_by(feature: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field is never made of a part of its quantities."""
    monkeypatch.setattr(curvature, "run", lambda *_: None)
    model, loss = extend(sequence()), extend(nn.CrossEntropyLoss())
    message = r"parameter '(weight|bias)'.*without the quantities that " + feature.__name__
    with pytest.raises(RuntimeError, match=message), backpack(feature()):
        loss(model(x), y).backward()


def test_an_error_inside_a_feature_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchGrad, "value", lambda *_: {}["a typing error"])
    model, loss = extend(sequence()), extend(nn.CrossEntropyLoss())
    with pytest.raises(KeyError, match="typing"), backpack(BatchGrad()):
        loss(model(x), y).backward()


@pytest.mark.parametrize("index", [5, -6])
@pytest.mark.parametrize("feature", [BatchGrad, SqrtGGNExact, SqrtGGNMC])
def test_subsampling_out_of_range(feature: Any, index: int) -> None:
    model, loss = extend(sequence()), extend(nn.CrossEntropyLoss())
    refused(
        lambda: loss(model(x), y), model, feature(subsampling=[0, index]), (IndexError, ValueError), str(index), "5"
    )
