"""Modules and operations that a feature has no value for: named, with the remedy."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import satchel
from cases import Case, Wired
from conftest import DEFINITIONS, FEATURES, comparable, is_sampled
from failures import refused, sequence, x, y
from networks import NETWORKS
from reference import Reference, contributions
from satchel import backpack, extend
from satchel.extensions import (
    KFAC,
    KFLR,
    KFRA,
    BatchGrad,
    DiagGGNExact,
    DiagHessian,
)
from satchel.registry import REGISTRY
from satchel.runtime import rules
from satchel.runtime.extension import Extension
from satchel.runtime.rules import Layer, Need, Rule, Sizes


class Scale(nn.Module):
    """A module with a parameter and without a definition."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


@pytest.mark.parametrize("feature", [KFAC, KFLR, KFRA])
def test_factors_of_two_structures(feature: Any) -> None:
    """A table and a linear map read one tensor by its rows and by its columns."""
    table, head = nn.Embedding(3, 6), nn.Linear(6, 3, bias=False)
    head.weight = table.weight
    model, loss = extend(nn.Sequential(table, nn.Tanh(), head)), extend(nn.CrossEntropyLoss())
    refused(
        lambda: loss(model(y), y),
        model,
        feature(),
        NotImplementedError,
        "shared",
        "Embedding",
        "Linear",
        feature.__name__,
    )


@pytest.mark.parametrize(
    "module,name,feature",
    [(lambda: nn.LayerNorm(20), "weight", f) for f in (KFAC, KFLR, KFRA)]
    + [(lambda: Scale(20), "gain", f) for f in (KFAC, KFLR, KFRA)],
)
def test_exact_block_of_many_elements(module: Callable[[], nn.Module], name: str, feature: Any) -> None:
    """A parameter without Kronecker structure, of a layer or of a node: its block is refused by its size."""
    model, loss = extend(nn.Sequential(nn.Linear(4, 20), module(), nn.Linear(20, 3))), extend(nn.CrossEntropyLoss())
    words = (f"exact block of '{name}'", "'1", feature.__name__, "memory_limit")
    with satchel.settings(memory_limit=1000):
        refused(lambda: loss(model(x), y), model, feature(), MemoryError, *words)


UNSUPPORTED = {"own": Scale, "bilinear": lambda: Bilinear()}


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(6, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, x)


class Outer(Extension):
    """A feature of a Kronecker structure alone. (Those of the package have the exact block where there is none.)"""

    field = "outer_factor"

    def needs(self, layer: Layer) -> tuple[Need, ...]:
        return (Need("exact", "output_factor_expand"),)

    def value(self, q: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
        return q["output_factor_expand"]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_module_without_definition(feature: Any, name: str) -> None:
    model, loss = extend(sequence(UNSUPPORTED[name]())), extend(nn.CrossEntropyLoss())
    with warnings.catch_warnings(), backpack(feature()):
        warnings.simplefilter("ignore")
        loss(model(x), y).backward()
    assert all(hasattr(p, feature.field) for p in model.parameters())


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_module(name: str) -> None:
    """Names the module's path and class, the parameter, the feature, what is supported and how to add it."""
    model, loss = extend(sequence(UNSUPPORTED[name]())), extend(nn.CrossEntropyLoss())
    message = refused(
        lambda: loss(model(x), y), model, Outer(), NotImplementedError, "Outer", "definition", "strict=False"
    )
    for layer in DEFINITIONS.layers:
        assert layer.name in message
    assert "'1" in message, "the module's path"
    assert any(p in message for p in ("gain", "weight", "bias", "pair"))


def test_not_strict() -> None:
    """strict=False: a warning, and all other fields."""
    model, loss = extend(sequence(Scale())), extend(nn.CrossEntropyLoss())
    with pytest.warns(UserWarning, match="gain"), backpack(Outer(), DiagHessian(), strict=False):
        loss(model(x), y).backward()
    assert all(hasattr(p, "outer_factor") for m in (model[0], model[2]) for p in m.parameters())
    assert all(hasattr(p, "diag_h") for p in model.parameters())
    assert not hasattr(model[1].gain, "outer_factor")


def test_frozen_unsupported_module_is_an_op() -> None:
    model, loss = extend(sequence(Scale().requires_grad_(False))), extend(nn.CrossEntropyLoss())
    with warnings.catch_warnings(), backpack(BatchGrad(), DiagGGNExact()):
        warnings.simplefilter("error")
        loss(model(x), y).backward()
    assert all(hasattr(p, "diag_ggn_exact") for m in (model[0], model[2]) for p in m.parameters())


def test_module_extended_too_late() -> None:
    """A module that came after extend: its parameters are used by nodes."""
    model, loss = extend(sequence(nn.ReLU())), extend(nn.CrossEntropyLoss())
    model[2] = nn.Linear(6, 3)
    with backpack(BatchGrad()):
        loss(model(x), y).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)


@pytest.mark.parametrize("feature", FEATURES)
def test_parameter_used_by_a_functional(feature: Any) -> None:
    """A use outside modules is added or refused, never forgotten."""

    def wire(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(F.linear(m.act(m.a(x)), m.a.weight.T)))

    def build() -> Any:
        torch.manual_seed(0)
        return Wired(wire, a=nn.Linear(4, 6), act=nn.Tanh(), b=nn.Linear(4, 3)).double()

    model, loss = extend(build()), extend(nn.CrossEntropyLoss())
    try:
        with backpack(feature()):
            loss(model(x.double()), y).backward()
    except NotImplementedError as error:
        assert feature.__name__ in str(error) and "weight" in str(error)
        return
    if is_sampled(feature):
        return
    reference = Reference(build(), [x.double()], [contributions(nn.CrossEntropyLoss(), y)])
    value = comparable(feature, getattr(model.a.weight, feature.field))
    torch.testing.assert_close(value, reference.field(feature.__name__, "a.weight"))


class Once(torch.autograd.Function):
    """Says that its backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return gradient * h.exp()


NOT_TWICE: dict[str, Callable[[Tensor], Tensor]] = {
    "Once": Once.apply,
    "Cdist": lambda h: torch.cdist(h.view(-1, 3, 2), torch.ones(5, 2, 2)).flatten(1),
}


@pytest.mark.parametrize("name", NOT_TWICE)
@pytest.mark.parametrize("feature", FEATURES)
def test_backward_that_cannot_be_differentiated(name: str, feature: Any) -> None:
    """Only the Hessian needs that; the error names the node as autograd does."""

    def wire(m: Any, x: Tensor) -> Tensor:
        return m.b(NOT_TWICE[name](m.a(x)))

    model, loss = extend(Wired(wire, a=nn.Linear(4, 6), b=nn.Linear(6, 3))), extend(nn.CrossEntropyLoss())
    run = lambda: loss(model(x), y)  # noqa: E731
    if feature.__name__.endswith("DiagHessian"):
        refused(run, model, feature(), NotImplementedError, feature.__name__, name, "backward", "DiagGGN")
        return
    with backpack(feature()):
        run().backward()


def test_nonlinear_op_below_all_parameters_is_no_obstacle() -> None:
    model, loss = extend(sequence(nn.Tanh())), extend(nn.CrossEntropyLoss())
    inputs = x.clone().requires_grad_()
    with backpack(DiagHessian(), KFRA()):
        loss(model(F.gelu(inputs)), y).backward()
    assert all(hasattr(p, "diag_h") and hasattr(p, "kfra") for p in model.parameters())


def test_reuse_in_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer whose rules read its output, ∂²y/∂θ∂x cannot be had from them."""

    def per_sample(factor: Tensor, input: Tensor, output: Tensor) -> Tensor:
        return factor.transpose(-2, -1) @ input

    def changed(layer: Any) -> Any:
        if layer.module is not nn.Linear:
            return layer
        weight = {**layer.parameters["weight"], "per_sample": Rule(per_sample, ("input", "output"))}
        return dataclasses.replace(layer, parameters={**layer.parameters, "weight": weight})

    layers = tuple(map(changed, REGISTRY.layers))
    monkeypatch.setattr(rules, "_installed", dataclasses.replace(REGISTRY, layers=layers))
    network = next(n for n in NETWORKS if n.name == "recurrent")
    case = Case(network, nn.CrossEntropyLoss, "mean")
    model, loss = extend(network.model()), extend(case.criterion())
    run = lambda: loss(case.arranged(model(network.input())), case.target())  # noqa: E731
    refused(run, model, DiagHessian(), NotImplementedError, "DiagHessian", "weight", "twice", "DiagGGN")


@pytest.mark.parametrize("feature", FEATURES)
def test_inplace_on_a_part(feature: Any) -> None:
    """Of a tensor that others read as well: autograd rebuilds the graph around it."""

    def wire(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        m.act(h[:, :3])
        return m.b(h)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Wired(wire, a=nn.Linear(4, 6), act=nn.ReLU(inplace=True), b=nn.Linear(6, 3)).double()

    model, loss = extend(build()), extend(nn.MSELoss())
    target = torch.zeros(5, 3, dtype=torch.float64)
    reference = Reference(build(), [x], [contributions(nn.MSELoss(), target)])
    with backpack(feature()):
        loss(model(x.double()), target).backward()
    if not is_sampled(feature) and feature is not KFRA:  # its reference goes by the calls, not by what they overwrite
        for name, p in model.named_parameters():
            value = comparable(feature, getattr(p, feature.field))
            torch.testing.assert_close(value, reference.field(feature.__name__, name))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("what", "reentrant"), [("layers", False), ("layers", True), ("loss", False)])
def test_checkpoint(feature: Any, what: str, reentrant: bool) -> None:
    """Right, or an error with a remedy."""
    model, loss = extend(sequence(nn.Tanh()).double()), extend(nn.CrossEntropyLoss())
    inputs = x.double().requires_grad_()

    def value() -> Tensor:
        if what == "loss":
            return checkpoint(lambda h: loss(h, y), model(inputs), use_reentrant=reentrant)
        return loss(model[2](checkpoint(model[:2], inputs, use_reentrant=reentrant)), y)

    def new() -> Any:
        return feature(generator=torch.Generator().manual_seed(0)) if is_sampled(feature) else feature()

    try:
        with backpack(new()):
            value().backward()
    except NotImplementedError as error:
        assert "checkpoint" in str(error)
        return
    fields = [getattr(p, feature.field) for p in model.parameters()]
    with backpack(new()):
        loss(model(inputs), y).backward()
    torch.testing.assert_close(fields, [getattr(p, feature.field) for p in model.parameters()])
