"""What definitions say must be refused, is: before a field is set, with the word that they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cases import drawn
from conftest import DEFINITIONS, module_class
from satchel import backpack, extend
from satchel.extensions import KFLR, KFRA, BatchGrad, BatchL2Grad, DiagGGNExact, DiagHessian

REFUSED = [
    pytest.param(definition, example, id=f"{definition.name}-{example.mentions}")
    for definition in (*DEFINITIONS.layers, *DEFINITIONS.passing, *DEFINITIONS.losses)
    for example in definition.refused
]
CURVATURE = [DiagGGNExact, DiagHessian, KFLR, KFRA]


@pytest.mark.parametrize("definition,example", REFUSED)
@pytest.mark.parametrize("feature", [BatchGrad, BatchL2Grad, *CURVATURE])
def test_what_a_definition_refuses(definition: Any, example: Any, feature: Any) -> None:
    """Three samples, as many as channels: without a batch axis, they fit as well."""
    if example.mentions == "batch" and feature not in CURVATURE and not definition.parameters:
        pytest.skip("individual gradients of the layers below are right, whatever shape the loss sees")
    module = drawn(module_class(definition), example)
    if example.below is None:
        inputs = torch.randn(3, *example.shape)
        model: Any = extend(nn.Sequential(nn.Linear(inputs.shape[-1], inputs.shape[-1]), module))
    else:
        inputs = torch.randint(example.below, (3, *example.shape))
        model = extend(nn.Sequential(module))
    loss, kept = extend(nn.MSELoss()), torch.zeros(())
    for p in model.parameters():
        setattr(p, feature.field, kept)
    with pytest.raises((NotImplementedError, ValueError, RuntimeError)) as raised, backpack(feature()):
        output = model(inputs)
        loss(output, torch.zeros_like(output)).backward()
    assert example.mentions in str(raised.value)
    assert all(getattr(p, feature.field) is kept for p in model.parameters()), "a field was overwritten"


@pytest.mark.parametrize(
    "layer,shape",
    [(nn.BatchNorm1d, (5, 3)), (nn.BatchNorm2d, (5, 3, 2, 4)), (nn.BatchNorm3d, (5, 3, 2, 4, 2)), (nn.RReLU, (5, 3))],
)
def test_evaluation_mode_is_the_remedy(layer: Any, shape: tuple[int, ...]) -> None:
    """What is refused in training mode says so, and `eval()` on the one layer is enough."""
    module = layer() if layer is nn.RReLU else layer(3)
    model: Any = extend(nn.Sequential(nn.Linear(shape[-1], shape[-1]), module, nn.Flatten(), nn.LazyLinear(2)))
    x, loss = torch.randn(shape), extend(nn.MSELoss())
    model(x)
    with pytest.raises(NotImplementedError, match=r"eval\(\)"), backpack(DiagGGNExact()):
        loss(model(x), torch.zeros(5, 2)).backward()
    module.eval()
    with backpack(DiagGGNExact()):
        loss(model(x), torch.zeros(5, 2)).backward()
    assert all(hasattr(p, "diag_ggn_exact") for p in model.parameters())
