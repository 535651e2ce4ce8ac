"""Every feature on the blocks of real networks, beside dense autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from architectures import ARCHITECTURES
from conftest import FEATURES, KERNELS, Agree, Pass, is_sampled, label
from networks import Case, Network
from satchel import extensions

EXACT = [feature for feature in FEATURES if not is_sampled(feature)]
SAMPLED = [feature for feature in FEATURES if is_sampled(feature)]
#: A parameter in several places that are not more positions of one: its factors are not defined, and refused by name.
APART = {"inception", "siamese_convolution", "normalised_twice"}
KRONECKER = (extensions.KFAC, extensions.KFLR, extensions.KFRA)
pytestmark = pytest.mark.parametrize("network", ARCHITECTURES, ids=label)


def expected(case: Case, feature: type, **options: Any) -> dict[str, Any]:
    reference = case.reference()
    return {name: reference.field(feature.__name__, name, **options) for name in reference.parameters}


def defined(network: Network, features: list[Any]) -> list[Any]:
    return [f for f in features if network.name not in APART or f not in KRONECKER]


def test_fields(network: Network, loss: Any, agree: Agree) -> None:
    case = Case(network, loss, "mean")
    done = Pass(case, torch.float64, "aten", *(feature() for feature in defined(network, EXACT)))
    for feature in defined(network, EXACT):
        agree(done.fields(feature), expected(case, feature))
    gradients = {name: p.grad for name, p in done.network.named_parameters()}
    agree(gradients, {name: g.sum(0) for name, g in case.reference().gradients.items()})


@pytest.mark.parametrize("backend", ["aten", *KERNELS])
def test_fields_in_single_precision(network: Network, backend: str, agree: Agree) -> None:
    case = Case(network, torch.nn.MSELoss, "sum")
    done = Pass(case, torch.float32, backend, *(feature() for feature in defined(network, EXACT)))
    for feature in defined(network, EXACT):
        agree(done.fields(feature), expected(case, feature), tolerance=1e-4)


def test_sampled_fields(network: Network, loss: Any, agree: Agree) -> None:
    case = Case(network, loss, "mean")
    done = Pass(
        case, torch.float64, "aten", *(feature(mc_samples=2) for feature in defined(network, SAMPLED)), reveal=True
    )
    drawn = done.model.curvature(done.model.probe.weight.diag_ggn_mc)
    for feature in defined(network, SAMPLED):
        agree(done.fields(feature), expected(case, feature, curvature=drawn))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_approximation(network: Network, approximation: str, agree: Agree) -> None:
    case = Case(network, torch.nn.CrossEntropyLoss, "mean")
    if network.name in APART:
        with pytest.raises(NotImplementedError, match="shared"):
            Pass(case, torch.float64, "aten", extensions.KFRA())
        return
    done = Pass(case, torch.float64, "aten", extensions.KFLR(approximation=approximation))
    agree(done.fields(extensions.KFLR), expected(case, extensions.KFLR, approximation=approximation))


def test_table5(network: Network, agree: Agree) -> None:
    case = Case(network, torch.nn.CrossEntropyLoss, "mean")
    done = Pass(case, torch.float64, "aten", *(feature(scaling="table5") for feature in defined(network, EXACT)))
    for feature in defined(network, EXACT):
        agree(done.fields(feature), expected(case, feature, scaling="table5"))
