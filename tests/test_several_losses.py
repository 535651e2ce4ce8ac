"""What happens above the modules: several losses and outputs, losses that are not modules, rescaling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import Wired
from conftest import EXACT, Agree, comparable
from graphs import FIRST_ORDER, built, check, labels, two_heads, values, x
from reference import Reference, contributions
from satchel import backpack, extend
from satchel.extensions import (
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
)
from satchel.runtime.extension import Extension
from satchel.runtime.rules import Need


def deep_supervision() -> nn.Module:
    """The first output lies above the second."""

    def wire(m: Any, x: Tensor) -> Any:
        first = m.classes(m.act(m.a(x)))
        return first, m.values(m.act(first))

    return Wired(wire, a=nn.Linear(4, 6), act=nn.Sigmoid(), classes=nn.Linear(6, 3), values=nn.Linear(3, 3))


def one_head_twice() -> nn.Module:
    def wire(m: Any, x: Tensor) -> Any:
        f = m.b(m.act(m.a(x)))
        return f, f

    return Wired(wire, a=nn.Linear(4, 6), act=nn.Tanh(), b=nn.Linear(6, 3))


def two_calls() -> nn.Module:
    """The graphs below the outputs have no node in common, but parameters."""

    def wire(m: Any, x: Tensor) -> Any:
        return m.b(m.act(m.a(x))), m.b(m.act(m.a(2 * x)))

    return Wired(wire, a=nn.Linear(4, 6), act=nn.Tanh(), b=nn.Linear(6, 3))


@pytest.mark.parametrize("build", [two_heads, deep_supervision, one_head_twice, two_calls])
@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
def test_two_losses(build: Callable[[], nn.Module], together: bool, agree: Agree) -> None:
    """Curvatures of several losses add: for one_head_twice in one field, for the others where the paths meet."""
    ce, mse = extend(nn.CrossEntropyLoss()), extend(nn.MSELoss())
    features = EXACT if together else []

    def total(outputs: Any) -> Tensor:
        return ce(outputs[0], labels) + 0.5 * mse(outputs[1], values)

    losses = [contributions(nn.CrossEntropyLoss(), labels), contributions(nn.MSELoss(), values, 0.5)]
    for chosen in [features] if together else [[feature] for feature in EXACT]:
        check(agree, build, total, losses, chosen)


def test_two_backwards_overwrite(agree: Agree) -> None:
    """Each backward leaves the fields of its own loss; only .grad accumulates."""
    model = extend(built(one_head_twice))
    ce, mse = extend(nn.CrossEntropyLoss()), extend(nn.MSELoss())
    f, _ = model(x)
    features: list[Any] = [BatchGrad, DiagGGNExact]
    for loss, reference in [
        (ce(f, labels), contributions(nn.CrossEntropyLoss(), labels)),
        (mse(f, values), contributions(nn.MSELoss(), values)),
    ]:
        with backpack(*(feature() for feature in features)):
            loss.backward(retain_graph=True)
        wanted = Reference(built(one_head_twice), [x], [reference, lambda f: f.sum(1) * 0])
        for feature in features:
            fields = {name: comparable(feature, getattr(p, feature.field)) for name, p in model.named_parameters()}
            agree(fields, {name: wanted.field(feature.__name__, name) for name in fields})


@pytest.mark.parametrize("factor", [3.0, 0.25])
@pytest.mark.parametrize("feature", EXACT)
def test_rescaled_loss(factor: float, feature: Any, agree: Agree) -> None:
    loss = extend(nn.CrossEntropyLoss())
    losses = [contributions(nn.CrossEntropyLoss(), labels, factor)]
    check(agree, lambda: nn.Linear(4, 3), lambda f: factor * loss(f, labels), losses, [feature])


@pytest.mark.parametrize("feature", EXACT)
def test_gradient_passed_to_backward(feature: Any, agree: Agree) -> None:
    """``loss.backward(gradient=3)`` is ``(3 * loss).backward()``."""
    model: Any = extend(built(lambda: nn.Linear(4, 3)))
    loss = extend(nn.MSELoss(reduction="sum"))
    with backpack(feature()):
        loss(model(x), values).backward(gradient=torch.tensor(3.0, dtype=torch.float64))
    weighted = contributions(nn.MSELoss(reduction="sum"), values, 3.0)
    reference = Reference(built(lambda: nn.Linear(4, 3)), [x], [weighted])
    fields = {name: comparable(feature, getattr(p, feature.field)) for name, p in model.named_parameters()}
    agree(fields, {name: reference.field(feature.__name__, name) for name in fields})


def test_rescaled_sampled_loss() -> None:
    """S is scaled by √factor."""
    model: Any = extend(built(lambda: nn.Linear(4, 3)))
    loss = extend(nn.CrossEntropyLoss())
    fields = []
    for factor in (1.0, 4.0):
        with backpack(DiagGGNMC(generator=torch.Generator().manual_seed(0))):
            (factor * loss(model(x), labels)).backward()
        fields.append(model.weight.diag_ggn_mc)
    torch.testing.assert_close(fields[1], 4 * fields[0])


FREE_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "one output": lambda f: f[:, 0].sum(),
    "functional": lambda f: F.cross_entropy(f, labels),
    "weighted": lambda f: (F.cross_entropy(f, labels, reduction="none") * torch.arange(1.0, 6.0)).sum(),
    "regularised": lambda f: f.pow(4).mean() + f.abs().sum(),
}


@pytest.mark.parametrize("name", FREE_LOSSES)
def test_first_order_needs_no_extended_loss(name: str, agree: Agree) -> None:
    total = FREE_LOSSES[name]

    def per_sample(f: Tensor) -> Tensor:
        leaf = f if f.requires_grad else f.detach().requires_grad_()
        (slope,) = torch.autograd.grad(total(leaf), leaf, retain_graph=True)
        return (slope.detach() * f).sum(1)  # the same gradients

    build = lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))  # noqa: E731
    check(agree, build, total, [per_sample], FIRST_ORDER)


def test_loss_of_each_sample(agree: Agree) -> None:
    """reduction="none" with weights of one's own is the same per sample, for first order."""
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    loss = nn.CrossEntropyLoss(reduction="none")
    per_sample = lambda f: loss(f, labels) * weights  # noqa: E731
    check(agree, lambda: nn.Linear(4, 3), lambda f: per_sample(f).sum(), [per_sample], FIRST_ORDER)


def test_regularisation_of_parameters_is_no_sample(agree: Agree) -> None:
    """A term that reads the parameters themselves adds to .grad, not to a sample."""
    model: Any = extend(built(lambda: nn.Linear(4, 3)))
    loss = extend(nn.MSELoss())
    with backpack(BatchGrad(), DiagGGNExact()):
        (loss(model(x), values) + model.weight.square().sum()).backward()
    reference = Reference(built(lambda: nn.Linear(4, 3)), [x], [contributions(nn.MSELoss(), values)])
    for feature in (BatchGrad, DiagGGNExact):
        fields = {name: comparable(feature, getattr(p, feature.field)) for name, p in model.named_parameters()}
        agree(fields, {name: reference.field(feature.__name__, name) for name in fields})
    torch.testing.assert_close(model.weight.grad, reference.gradients["weight"].sum(0) + 2 * model.weight.detach())


class OfOneKind(Extension):
    """Individual gradients, asked for where one kind of layer uses a parameter."""

    field = "of_one_kind"

    def needs(self, layer: Any) -> tuple[Need, ...]:
        return (Need("gradient", "per_sample"),) if layer.module is nn.RMSNorm else ()

    def value(self, q: Any, sizes: Any) -> torch.Tensor:
        return q["per_sample"][0] if q else torch.zeros(1)


def test_a_parameter_of_two_kinds_of_layers_that_no_walk_sees_together():
    """What is asked of δ at one use is asked of the others, too: those reached first say what, so that one order has the gradients."""
    found = []
    for kinds in ([nn.LayerNorm, nn.RMSNorm], [nn.RMSNorm, nn.LayerNorm]):
        first, second = (extend(kind(4)) for kind in kinds)
        second.weight = first.weight
        x = torch.randn(5, 4)
        with backpack(OfOneKind()):
            (first(x).square().sum() + second(x).pow(3).sum()).backward()
        value = first.weight.of_one_kind
        if value.shape == (5, 4):
            found.append(value)
            assert torch.allclose(value.sum(0), first.weight.grad, rtol=1e-4, atol=1e-5)
    assert found
