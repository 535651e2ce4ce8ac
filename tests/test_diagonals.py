"""What columns and diagonals leave on a parameter is one product where features add both, and apart where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from satchel import backpack, extend
from satchel.extensions import BatchDiagHessian, DiagGGNExact, DiagHessian
from satchel.runtime import curvature, diagonals
from satchel.runtime.cost import forced
from satchel.runtime.extension import Extension
from satchel.runtime.rules import Layer, Need, Sizes

N = 3


class Parts(Extension):
    """The summands of DiagHessian, which it does not add."""

    field = "parts"

    def needs(self, layer: Layer) -> tuple[Need, ...]:
        return DiagHessian().needs(layer)

    def value(self, q: Mapping[str, Tensor], sizes: Sizes) -> list[Tensor]:
        return [q["sum_of_squares"], *[value for name, value in q.items() if name != "sum_of_squares"]]


class Residual(Extension):
    """What DiagHessian adds to DiagGGNExact."""

    field = "residual"

    def needs(self, layer: Layer) -> tuple[Need, ...]:
        return tuple(need for need in DiagHessian().needs(layer) if need.source != "exact")

    def value(self, q: Mapping[str, Tensor], sizes: Sizes) -> list[Tensor]:
        return list(q.values())


@pytest.fixture(params=["sigmoid", "three", "around"])
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """Residual curvature as a diagonal, also as signed columns, and in a layer with other positions."""
    torch.manual_seed(0)
    own = {
        "sigmoid": [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Sigmoid()],
        "three": [nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh()],
        "around": [nn.Conv1d(2, 3, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(6, 5), nn.Sigmoid()],
    }
    with forced("columns"):
        yield extend(nn.Sequential(*own[request.param], nn.Linear(5, 3)).double())


def found(model: nn.Module, *features: Any) -> list[Any]:
    torch.manual_seed(1)
    shape = (2, 2) if isinstance(model[0], nn.Conv1d) else (4,)
    with backpack(*features):
        extend(nn.CrossEntropyLoss())(model(torch.randn(N, *shape, dtype=torch.float64)), torch.arange(N)).backward()
    return [[getattr(p, feature.field) for p in model.parameters()] for feature in features]


def test_one_product_for_each_parameter(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer at one position, whatever arrives, and however often."""
    calls: list[Any] = []
    for module in (diagonals, curvature):
        product = module.quantities_of
        monkeypatch.setattr(module, "quantities_of", lambda *given, own=product: calls.append(given) or own(*given))
    found(model, DiagHessian())
    linear = [p for m in model if isinstance(m, nn.Linear) for p in m.parameters()]
    for p in linear:
        assert sum(uses[0].parameter is p for uses, *_ in calls) == 1


def test_alone_and_beside_others(model: nn.Module) -> None:
    """DiagGGNExact asks for columns without the diagonals; the diagonals of single samples add up to those of all."""
    (alone,), (single,) = found(model, DiagHessian()), found(model, BatchDiagHessian())
    beside, ggn = found(model, DiagHessian(), DiagGGNExact())
    torch.testing.assert_close(beside, alone)
    torch.testing.assert_close([value.sum(0) for value in single], alone)
    torch.testing.assert_close([ggn], found(model, DiagGGNExact()))


def test_features_that_do_not_add(model: nn.Module) -> None:
    """They get the parts, also beside one that adds, and also if they ask for no exact columns."""
    (ggn,), (whole,) = found(model, DiagGGNExact()), found(model, DiagHessian())
    for features in ([Residual()], [DiagHessian(), Residual()]):
        added = [sum(parts, first) for parts, first in zip(found(model, *features)[-1], ggn, strict=True)]
        torch.testing.assert_close(added, whole)
    for features in ([Parts()], [DiagHessian(), Parts()]):
        parts = found(model, *features)[-1]
        torch.testing.assert_close([first for first, *_ in parts], ggn)
        torch.testing.assert_close([sum(each[1:], each[0]) for each in parts], whole)
    assert any(len(each) > 1 for each in parts)
