"""What a pass holds beyond the gradient: by torch's count of bytes, without a clock.

The number of samples times that of the parameters is far above what any of these may hold.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import satchel
from conftest import FEATURES
from peak import peak
from satchel import backpack, extend
from satchel.extensions import KFLR, KFRA, DiagGGNExact, DiagHessian
from satchel.runtime.cost import machine

N = 128
LIMIT = 1 << 22
#: Those whose values have not an entry for each sample and parameter. KFRA holds a matrix, which has an estimate of its own.
REDUCED = [f for f in FEATURES if not f.__name__.startswith(("BatchGrad", "BatchDiag", "Sqrt")) and f is not KFRA]


class Product(nn.Module):
    """A parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(360, 360) / 19)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def twice() -> nn.Module:
    shared = nn.Linear(360, 360)
    return nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(360, 3))


def ending(*layers: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(features, 3))


#: Networks with the shape of a sample. Activations are small.
NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 3)), (256,)),
    "positions": (lambda: nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 2), nn.Flatten()), (3, 256)),
    "convolution": (lambda: ending(nn.Conv2d(128, 128, 3), features=512), (128, 4, 4)),
    "groups": (lambda: ending(nn.Conv2d(128, 256, 3, groups=2), features=1024), (128, 4, 4)),
    "transposed": (lambda: ending(nn.ConvTranspose2d(128, 128, 3), features=1152), (128, 1, 1)),
    "twice": (twice, (360,)),
    "loose": (lambda: nn.Sequential(Product(), nn.Tanh(), nn.Linear(360, 3)), (360,)),
}


class Trained:
    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.model, self.loss = extend(model), extend(nn.CrossEntropyLoss())
        self.x = torch.randn(N, *shape)
        self.y = torch.zeros(
            self.model(self.x).shape[::2], dtype=torch.long
        )  # of classes at the positions that there are

    def run(self, *features: Any) -> None:
        for p in self.model.parameters():
            p.grad = None
            vars(p).clear()
        if features:
            with backpack(*features):
                self.loss(self.model(self.x), self.y).backward()
        else:
            self.loss(self.model(self.x), self.y).backward()

    def extra(self, feature: Any) -> int:
        """Bytes at the peak beyond that of the gradient alone. The first runs make what is made once."""
        self.run()
        self.run(feature())
        return -peak(self.run) + peak(lambda: self.run(feature()))

    def results(self, feature: Any) -> int:
        fields = [getattr(p, feature.field) for p in self.model.parameters() if hasattr(p, feature.field)]
        return sum(t.nbytes for field in fields for t in (field if isinstance(field, list) else [field]))

    @property
    def parameters(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())


CASES = [(f, network) for f in REDUCED for network in NETWORKS if (f, network) != (DiagHessian, "twice")]  # minutes


@pytest.mark.parametrize("feature,network", CASES)
def test_nothing_of_the_size_of_samples_times_parameters(network: str, feature: Any) -> None:
    """Blocks of pullbacks and columns within the limit, and some copies of parameters and results."""
    build, shape = NETWORKS[network]
    trained = Trained(build(), shape)
    with satchel.settings(memory_limit=LIMIT):
        extra = trained.extra(feature)
    assert 4 * machine.cache_elements <= LIMIT
    bound = 4 * LIMIT + 4 * trained.parameters + 2 * trained.results(feature)
    assert extra <= bound, f"{extra:,} bytes"
    assert bound < N * trained.parameters * 2 / 3  # otherwise this would show nothing


def once() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16), nn.Flatten())


def again() -> nn.Module:
    shared = nn.Linear(64, 64)
    return nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(64, 16), nn.Flatten())


@pytest.mark.parametrize("network", [once, again])
@pytest.mark.parametrize("feature", [DiagGGNExact, KFLR])
def test_the_limit_bounds_a_sweep(network: Any, feature: Any) -> None:
    """Columns at all edges are ten times as large. The factor at the loss, which is small, is held whole."""
    trained = Trained(network(), (8, 64))
    factor = 128 * N * 128 * 4
    with satchel.settings(memory_limit=LIMIT):
        extra = trained.extra(feature)
    assert extra <= 3 * LIMIT + 3 * factor + 4 * (trained.parameters + trained.results(feature)), f"{extra:,} bytes"
