"""A layer of several operations that torch computes in one node: columns pass it by that node, or by its rule, to the same end.

The slope of a curve is what its node makes of ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from satchel import backpack, extend
from satchel.extensions import DiagGGNExact, DiagGGNMC
from satchel.runtime import sweep

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LayerNorm": lambda: nn.LayerNorm((4, 3)),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(4, affine=True),  # its weights are repeated by another node
    "RMSNorm": lambda: nn.RMSNorm((4, 3), elementwise_affine=False),
    "Softmax": lambda: nn.Softmax(1),
    "GLU": lambda: nn.GLU(1),
    "GELU": lambda: nn.GELU(),
    "SiLU": lambda: nn.SiLU(),
    "Mish": lambda: nn.Mish(),
    "Hardswish": lambda: nn.Hardswish(),
}


#: Of these the node that has the input's edge is not all, or has not parameters alone beside it.
SEVERAL = ("InstanceNorm1d", "RMSNorm")
#: What is above the layer, and the shape of a sample there. torch reshapes what a fully connected layer makes of positions.
ABOVE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: nn.Conv1d(2, 4, 2), (2, 4)),
    "reshape": (lambda: nn.Linear(2, 3), (4, 2)),
}


def found(above: str, layer: str, feature: Any) -> list[Tensor]:
    torch.manual_seed(0)
    first, shape = ABOVE[above]
    net = nn.Sequential(first(), LAYERS[layer](), nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = torch.randn(5, *shape, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    net(x)
    net, loss = extend(net), extend(nn.CrossEntropyLoss())
    with backpack(feature(generator=torch.Generator().manual_seed(1)) if feature is DiagGGNMC else feature()):
        loss(net(x), y).backward()
    return [getattr(p, feature.field) for p in net.parameters()]


@pytest.mark.parametrize("feature", [DiagGGNExact, DiagGGNMC])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("above", ABOVE)
def test_both_ways_are_the_same(above: str, layer: str, feature: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    by_node = sweep.by_node
    monkeypatch.setattr(sweep, "by_node", lambda step: seen.append(by_node(step) is not None) or by_node(step))
    monkeypatch.setattr(sweep, "_LARGE", 1)
    own = found(above, layer, feature)
    assert seen == [layer not in SEVERAL]
    monkeypatch.setattr(sweep, "by_node", lambda step: None)
    torch.testing.assert_close(own, found(above, layer, feature), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layer", ["GELU", "GroupNorm"])
def test_not_by_a_node_of_another_precision(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast columns are wider than the node, which would round them."""
    asked: list[Any] = []
    monkeypatch.setattr(sweep, "by_node", asked.append)
    monkeypatch.setattr(sweep, "_LARGE", 1)
    net = extend(nn.Sequential(nn.Linear(4, 4), LAYERS[layer](), nn.Linear(4, 3)))
    for autocast in (False, True):
        asked.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = extend(nn.CrossEntropyLoss())(net(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1]))
        with backpack(DiagGGNExact()):
            loss.backward()
        assert bool(asked) != autocast
