"""Columns are written in the place of those above where nobody else holds these, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import EXACT
from satchel import backpack, extend, extensions
from satchel.runtime import sweep
from satchel.runtime.slopes import above, scaled

N = 3


class Twice(nn.Module):
    """What one ReLU's columns are is another's, and a sum's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.one, self.other = nn.Linear(4, 5), nn.Linear(5, 3), nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.one(h) + self.other(-h) + self.one(h - 1))


NETWORKS = {
    "chain": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.ReLU(), nn.Linear(5, 3)),
    "curves": lambda: nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.BatchNorm1d(5).eval(), nn.Sigmoid(), nn.Linear(5, 3)
    ),
    "pooled": lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(3, 3)),
    "twice": Twice,
}


@pytest.fixture(params=NETWORKS)
def given(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    shape = (2, 3) if request.param == "pooled" else (4,)
    return NETWORKS[request.param]().double(), torch.randn(N, *shape, dtype=torch.float64)


def fields(model: nn.Module, x: Tensor, *features: Any) -> list[Any]:
    with backpack(*features):
        extend(nn.CrossEntropyLoss())(extend(model)(x), torch.arange(N) % 3).backward()
    return [getattr(p, feature.field) for p in model.parameters() for feature in features]


def test_the_same_numbers(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing is ever written in place; in one pass, where features share their factors."""
    features = [feature() for feature in EXACT]
    written = fields(*given, *features)
    monkeypatch.setattr(sweep, "_WRITTEN", ())
    torch.testing.assert_close(written, fields(*given, *features), rtol=0, atol=0)


def test_something_is_written(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    held = sweep.held_elsewhere
    monkeypatch.setattr(sweep, "held_elsewhere", lambda tensor: seen.append(held(tensor)) or seen[-1])
    fields(*given, extensions.DiagGGNExact())
    assert not all(seen) and seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_above(dtype: torch.dtype) -> None:
    values, tensor = torch.randn(2, 3, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    want = values * (tensor > 0)
    torch.testing.assert_close(above(values, tensor, 0), want)
    assert above(values, tensor, 0, out=values) is values
    torch.testing.assert_close(values, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled(dtype: torch.dtype) -> None:
    values, slope = torch.randn(2, 3, 4, dtype=dtype), torch.randn(3, 1, dtype=dtype)
    want = values * slope
    torch.testing.assert_close(scaled(values, slope), want)
    assert scaled(values, slope, out=values) is values
    torch.testing.assert_close(values, want)
