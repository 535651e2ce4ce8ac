"""What tests of errors share: a small model, and that a refused backward says so and changes no field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FEATURES
from satchel import backpack, extend
from satchel.extensions import (
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    SumGradSquared,
    Variance,
)

torch.manual_seed(0)
x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
FIRST_ORDER = [BatchGrad, BatchL2Grad, SumGradSquared, Variance]
CURVATURE = [feature for feature in FEATURES if feature not in FIRST_ORDER]
KEPT = torch.zeros(())


def sequence(*between: nn.Module) -> Any:
    return nn.Sequential(nn.Linear(4, 6), *between, nn.Linear(6, 3))


def refused(
    run: Callable[[], Tensor],
    model: nn.Module,
    feature: Any,
    error: type[Exception] | tuple[type[Exception], ...],
    *mentions: str,
    context: dict[str, Any] | None = None,
) -> str:
    """Backward fails, says so, and changes no field."""
    for p in model.parameters():
        setattr(p, feature.field, KEPT)
    with pytest.raises(error) as raised, backpack(feature, **(context or {})):
        run().backward()
    message = str(raised.value)
    for word in mentions:
        assert word.lower() in message.lower(), f"{word!r} is not in: {message}"
    assert all(getattr(p, feature.field) is KEPT for p in model.parameters()), "a field was overwritten"
    assert not isinstance(raised.value, AttributeError | AssertionError)
    # and the next pass works
    fresh, loss = extend(sequence()), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad(), DiagGGNExact()):
        loss(fresh(x), y).backward()
    assert all(hasattr(p, "grad_batch") and hasattr(p, "diag_ggn_exact") for p in fresh.parameters())
    return message
