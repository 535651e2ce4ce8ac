"""create_graph=True: gradients through individual gradients and their variance."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Case, Network
from conftest import FEATURES, Agree, as_if_large
from networks import NETWORKS
from satchel import backend, backpack, extend
from satchel.extensions import BatchGrad, BatchL2Grad, DiagGGNExact, Variance

DIFFERENTIABLE: list[Any] = [BatchGrad, Variance]
SOME = ("linear", "sigmoid_tanh", "tanh_relu_sigmoid", "sequence", "skip", "siamese", "recurrent", "functional", "gelu",
        "inplace", "inplace_sequence", "frozen_some", "bias_free", "one_sample", "tied_parallel")  # fmt: skip
some = pytest.mark.parametrize("network", [n for n in NETWORKS if n.name in SOME], ids=lambda n: n.name)


def scalar(fields: dict[str, Tensor]) -> Tensor:
    """Some nonlinear function of all entries, the same for the package and the reference."""
    total = torch.zeros((), dtype=torch.float64)
    for k, name in enumerate(sorted(fields)):
        weights = torch.arange(1.0, fields[name].numel() + 1, dtype=torch.float64).view(fields[name].shape).sin()
        total = total + ((k + 1) * fields[name] * weights).sum() + fields[name].square().sum()
    return total


def fields_of(case: Case, feature: Any, model: nn.Module, x: Tensor, name: str = "aten") -> dict[str, Tensor]:
    target = case.target().double() if case.target().is_floating_point() else case.target()
    with backend(name), backpack(feature()):
        extend(case.criterion())(case.arranged(extend(model)(x)), target).backward(create_graph=True)
    return {n: getattr(p, feature.field) for n, p in model.named_parameters() if p.requires_grad}


def small() -> Any:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def plain_fields(case: Case, feature: Any, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The same from plain autograd, with a graph."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    terms = case.contributions(model(x))
    rows = [torch.autograd.grad(t, list(named.values()), create_graph=True) for t in terms]
    individual = {name: torch.stack(g) for name, g in zip(named, zip(*rows, strict=True), strict=True)}
    if feature is BatchGrad:
        return individual
    return {name: g.square().mean(0) - g.mean(0).square() for name, g in individual.items()}


@some
@pytest.mark.parametrize("feature", DIFFERENTIABLE)
def test_gradient_through_a_field(
    network: Network, loss: Any, reduction: str, backend: str, feature: Any, agree: Agree
) -> None:
    """∂(function of the fields)/∂(parameters and input) against autograd of the per-sample loop."""
    case = Case(network, loss, reduction)
    slopes = []
    for compute in (partial(fields_of, name="triton" if backend == "triton" else "aten"), plain_fields):
        model, x = network.model().double(), network.input().double().requires_grad_()
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(
            scalar(compute(case, feature, model, x)), [*named.values(), x], allow_unused=True, materialize_grads=True
        )
        slopes.append(dict(zip([*named, "input"], (s.detach() for s in found), strict=True)))
    agree(*slopes)


@some
@pytest.mark.parametrize("feature", DIFFERENTIABLE)
def test_however_large(network: Network, feature: Any, agree: Agree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a graph is written to memory that is there."""
    as_if_large(monkeypatch, cache_elements=1)
    test_gradient_through_a_field(network, nn.MSELoss, "mean", "aten", feature, agree)


@pytest.mark.parametrize("feature", DIFFERENTIABLE)
def test_against_finite_differences(feature: Any, loss: Any, agree: Agree) -> None:
    """Central differences of every parameter and of the input: independent of autograd's second derivatives."""
    case, step = Case(next(n for n in NETWORKS if n.name == "sigmoid_tanh"), loss, "mean"), 1e-5
    model, x = case.network.model().double(), case.network.input().double().requires_grad_()
    leaves = {**dict(model.named_parameters()), "input": x}
    slopes = torch.autograd.grad(
        scalar(fields_of(case, feature, model, x)), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    differences = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        for k in range(leaf.numel()):
            values = []
            for sign in (1, -1):
                leaf.data.view(-1)[k] += sign * step
                values.append(scalar(fields_of(case, feature, model, x)).item())
                leaf.data.view(-1)[k] -= sign * step
            differences[name].view(-1)[k] = (values[0] - values[1]) / (2 * step)
    agree(dict(zip(leaves, slopes, strict=True)), differences, tolerance=1e-7)


@pytest.mark.parametrize("feature", FEATURES)
def test_other_fields_are_constants(feature: Any) -> None:
    """Without create_graph no field carries a graph; with it only those that say so."""
    for create_graph in (False, True):
        model, loss = extend(small()), extend(nn.MSELoss())
        with backpack(feature()):
            loss(model(torch.randn(6, 4)), torch.randn(6, 3)).backward(create_graph=create_graph)
        for p in model.parameters():
            value = getattr(p, feature.field)
            for tensor in value if isinstance(value, list) else [value]:
                assert tensor.requires_grad == (create_graph and feature.differentiable)
            p.grad = None


def test_differentiable_features() -> None:
    assert all(feature.differentiable for feature in DIFFERENTIABLE)


class Norms(BatchL2Grad):
    """A constant that is made of the same quantity as a field with a graph."""

    field, differentiable = "norms", False


def test_a_constant_that_shares_a_quantity() -> None:
    model, loss = extend(small()), extend(nn.MSELoss())
    with backpack(BatchL2Grad(), Norms()):
        loss(model(torch.randn(6, 4)), torch.randn(6, 3)).backward(create_graph=True)
    for p in model.parameters():
        assert p.batch_l2.requires_grad and not p.norms.requires_grad
        assert torch.equal(p.batch_l2, p.norms)


def test_field_and_curvature_together() -> None:
    """A feature without a graph beside one with it does not cut it."""
    model, loss = extend(small()).double(), extend(nn.MSELoss())
    with backpack(BatchGrad(), DiagGGNExact(), Variance()):
        loss(model(torch.randn(6, 4).double()), torch.randn(6, 3).double()).backward(create_graph=True)
    slopes = torch.autograd.grad(
        sum(p.grad_batch.square().sum() + p.variance.sum() for p in model.parameters()), list(model.parameters())
    )
    assert all(s.abs().sum() > 0 for s in slopes)
    assert not any(p.diag_ggn_exact.requires_grad for p in model.parameters())


@pytest.mark.parametrize("call", ["backward", "autograd.grad"])
def test_gradient_penalty_trains(call: str) -> None:
    """The use: penalise the variance of the individual gradients."""
    torch.manual_seed(0)
    model, loss = extend(small()), extend(nn.MSELoss())
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    penalties = []
    for _ in range(30):
        model.zero_grad(set_to_none=True)
        value = loss(model(x), y)
        with backpack(Variance()):
            if call == "backward":
                value.backward(create_graph=True)
            else:
                torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        penalty = sum(p.variance.sum() for p in model.parameters())
        slopes = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for p, s in zip(model.parameters(), slopes, strict=True):
                p -= 0.5 * s
        penalties.append(penalty.item())
        model.zero_grad(set_to_none=True)
    assert penalties[-1] < 0.9 * penalties[0]
