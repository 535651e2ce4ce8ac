"""Every feature on the blocks of real networks, beside dense autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from architectures import ARCHITECTURES
from cases import Case, Network
from conftest import EXACT, KERNELS, SAMPLED, Agree, Pass, label
from satchel import extensions

pytestmark = pytest.mark.parametrize("network", ARCHITECTURES, ids=label)


def expected(case: Case, feature: type, **options: Any) -> dict[str, Any]:
    reference = case.reference()
    return {name: reference.field(feature.__name__, name, **options) for name in reference.parameters}


def test_fields(network: Network, loss: Any, agree: Agree) -> None:
    case = Case(network, loss, "mean")
    done = Pass(case, torch.float64, "aten", *(feature() for feature in EXACT))
    for feature in EXACT:
        agree(done.fields(feature), expected(case, feature))
    gradients = {name: p.grad for name, p in done.network.named_parameters()}
    agree(gradients, {name: g.sum(0) for name, g in case.reference().gradients.items()})


@pytest.mark.parametrize("backend", ["aten", *KERNELS])
def test_fields_in_single_precision(network: Network, backend: str, agree: Agree) -> None:
    case = Case(network, torch.nn.MSELoss, "sum")
    done = Pass(case, torch.float32, backend, *(feature() for feature in EXACT))
    for feature in EXACT:
        agree(done.fields(feature), expected(case, feature), tolerance=1e-4)


def test_sampled_fields(network: Network, loss: Any, agree: Agree) -> None:
    case = Case(network, loss, "mean")
    done = Pass(case, torch.float64, "aten", *(feature(mc_samples=2) for feature in SAMPLED), reveal=True)
    drawn = done.model.curvature(done.model.probe.weight.diag_ggn_mc)
    for feature in SAMPLED:
        agree(done.fields(feature), expected(case, feature, curvature=drawn))


@pytest.mark.parametrize("approximation", ["backpack", "expand", "reduce"])
def test_approximation(network: Network, reduction: str, approximation: str, agree: Agree) -> None:
    case = Case(network, torch.nn.CrossEntropyLoss, reduction)
    done = Pass(case, torch.float64, "aten", extensions.KFLR(approximation=approximation))
    agree(done.fields(extensions.KFLR), expected(case, extensions.KFLR, approximation=approximation))


def test_table5(network: Network, agree: Agree) -> None:
    case = Case(network, torch.nn.CrossEntropyLoss, "mean")
    done = Pass(case, torch.float64, "aten", *(feature(scaling="table5") for feature in EXACT))
    for feature in EXACT:
        agree(done.fields(feature), expected(case, feature, scaling="table5"))
