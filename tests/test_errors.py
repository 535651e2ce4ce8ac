"""Every way to fail: the message names where, what and the remedy, and a refused backward leaves earlier fields as they were."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import satchel
from conftest import DEFINITIONS, FEATURES, SECOND_ORDER, comparable, is_sampled
from networks import NETWORKS, Case, Wired
from reference import Reference, contributions
from satchel import backpack, disable, extend
from satchel.extensions import (
    KFLR,
    KFRA,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from satchel.registry import REGISTRY
from satchel.runtime import rules
from satchel.runtime.rules import Rule

torch.manual_seed(0)
x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
FIRST_ORDER = [BatchGrad, BatchL2Grad, SumGradSquared, Variance]
CURVATURE = [feature for feature in FEATURES if feature not in FIRST_ORDER]
#: Features made of individual pullbacks, which every differentiable use of a parameter has.
PULLED = [f for f in FEATURES if f.__name__ not in SECOND_ORDER]
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


# --- the call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [BatchGrad, nn.Linear(1, 1), "BatchGrad", None])
def test_not_an_extension(given: Any) -> None:
    with pytest.raises(ValueError) as raised:
        backpack(KFLR(), given)
    name = given.__name__ if isinstance(given, type) else type(given).__name__
    assert name in str(raised.value)
    if isinstance(given, type):
        assert "BatchGrad()" in str(raised.value), "the remedy"


@pytest.mark.parametrize("given", [nn.Linear, F.cross_entropy, None, torch.zeros(1)])
def test_not_a_module(given: Any) -> None:
    with pytest.raises(TypeError, match="Module"):
        extend(given)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("how", ["not extended", "disabled"])
def test_nothing_reached(feature: Any, how: str) -> None:
    model, loss = sequence(nn.ReLU()), nn.CrossEntropyLoss()
    if how == "disabled":
        model, loss = extend(model), extend(loss)
    with pytest.raises(RuntimeError, match=f"{feature.__name__}.*extend"), backpack(feature()):
        with disable():
            value = loss(model(x), y)
        value.backward()


@pytest.mark.parametrize("feature", CURVATURE)
@pytest.mark.parametrize("how", ["module", "functional", "sum"])
def test_loss_not_extended(feature: Any, how: str) -> None:
    model = extend(sequence(nn.ReLU()))
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "module": nn.CrossEntropyLoss(),
        "functional": F.cross_entropy,
        "sum": lambda f, y: f[:, 0].sum(),
    }
    message = refused(
        lambda: losses[how](model(x), y), model, feature(), RuntimeError, feature.__name__, "loss", "extend", "Linear"
    )
    assert "weight" in message or "bias" in message


@pytest.mark.parametrize("feature", CURVATURE)
def test_one_of_two_losses_not_extended(feature: Any) -> None:
    """A part of the curvature would be missing in silence."""
    model, loss = extend(sequence(nn.Tanh())), extend(nn.CrossEntropyLoss())

    def total() -> Tensor:
        f = model(x)
        return loss(f, y) + f.square().mean()

    refused(total, model, feature(), (RuntimeError, NotImplementedError), feature.__name__)


def test_non_scalar() -> None:
    model = extend(sequence())
    with pytest.raises(RuntimeError, match="scalar"), backpack(BatchGrad()):
        model(x).backward()


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("how", ["functional", "different reductions"])
def test_table5_needs_the_reduction(feature: Any, how: str) -> None:
    model = extend(sequence())
    ce, summed = extend(nn.CrossEntropyLoss()), extend(nn.CrossEntropyLoss(reduction="sum"))

    def total() -> Tensor:
        f = model(x)
        return F.cross_entropy(f, y) if how == "functional" else ce(f, y) + summed(f, y)

    error = refused(total, model, feature(scaling="table5"), RuntimeError, feature.__name__, "backpack")
    if feature in FIRST_ORDER:
        assert "table5" in error and "reduction" in error


@pytest.mark.parametrize("index", [5, -6])
@pytest.mark.parametrize("feature", [BatchGrad, SqrtGGNExact, SqrtGGNMC])
def test_subsampling_out_of_range(feature: Any, index: int) -> None:
    model, loss = extend(sequence()), extend(nn.CrossEntropyLoss())
    refused(
        lambda: loss(model(x), y), model, feature(subsampling=[0, index]), (IndexError, ValueError), str(index), "5"
    )


# --- modules and ops -----------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """A module with a parameter and without a definition."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


UNSUPPORTED = {"own": Scale, "bilinear": lambda: Bilinear()}


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(6, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, x)


@pytest.mark.parametrize("feature", [feature for feature in FEATURES if feature not in PULLED])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_module(feature: Any, name: str) -> None:
    """Names the module's path and class, the parameter, the feature, what is supported and how to add it.

    Only what individual pullbacks do not give is unsupported.
    """
    model, loss = extend(sequence(UNSUPPORTED[name]())), extend(nn.CrossEntropyLoss())
    message = refused(
        lambda: loss(model(x), y), model, feature(), NotImplementedError, feature.__name__, "definition", "strict=False"
    )
    for layer in DEFINITIONS.layers:
        assert layer.name in message
    assert "'1" in message, "the module's path"
    assert any(p in message for p in ("gain", "weight", "bias", "pair"))


@pytest.mark.parametrize("feature", [KFRA, DiagHessian])
def test_not_strict(feature: Any) -> None:
    """strict=False: a warning, and all other fields."""
    model, loss = extend(sequence(Scale())), extend(nn.CrossEntropyLoss())
    with pytest.warns(UserWarning, match="gain"), backpack(feature(), strict=False):
        loss(model(x), y).backward()
    assert all(hasattr(p, feature.field) for m in (model[0], model[2]) for p in m.parameters())
    assert not hasattr(model[1].gain, feature.field)


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
    "Attention": lambda h: F.scaled_dot_product_attention(*[h.view(-1, 1, 3, 2)] * 3).flatten(1),
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
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(feature: Any, reentrant: bool) -> None:
    """Right, or an error with a remedy."""
    model, loss = extend(sequence(nn.Tanh()).double()), extend(nn.CrossEntropyLoss())
    inputs = x.double().requires_grad_()

    def new() -> Any:
        return feature(generator=torch.Generator().manual_seed(0)) if is_sampled(feature) else feature()

    try:
        with backpack(new()):
            loss(model[2](checkpoint(model[:2], inputs, use_reentrant=reentrant)), y).backward()
    except NotImplementedError as error:
        assert "checkpoint" in str(error)
        return
    fields = [getattr(p, feature.field) for p in model.parameters()]
    with backpack(new()):
        loss(model(inputs), y).backward()
    torch.testing.assert_close(fields, [getattr(p, feature.field) for p in model.parameters()])


@pytest.mark.parametrize("layer", DEFINITIONS.layers, ids=lambda d: d.name)
def test_refused_inputs_of_definitions(layer: Any) -> None:
    """What a definition says must be refused is, with the word it says."""
    for example in layer.refused:
        if layer.of_integers:  # nothing lies below: see test_definitions
            continue
        module = getattr(nn, layer.module.rpartition(".")[2])(**example.arguments)
        inputs = torch.randn(3, *example.shape, requires_grad=True)
        model = extend(nn.Sequential(module, Wired(lambda m, h: m.a(h.reshape(1, -1)), a=nn.LazyLinear(2))))
        model(inputs)
        for feature in (BatchGrad, DiagGGNExact):
            loss = extend(nn.MSELoss())
            lift = extend(nn.Linear(inputs.shape[-1], inputs.shape[-1]))
            run = lambda: loss(model(lift(inputs)), torch.zeros(1, 2))  # noqa: B023, E731
            refused(run, lift, feature(), Exception, example.mentions)


# --- samples -----------------------------------------------------------------------------------------------------


def tokens_as_samples(m: Any, x: Tensor) -> Tensor:
    return m.b(m.act(m.a(x)).reshape(-1, 6))


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean over samples": lambda h: h - h.mean(0),
    "flip of the batch": lambda h: h.flip(0),
    "permuted batch": lambda h: h[[1, 2, 3, 4, 0]],
    "matrix of samples": lambda h: (h @ h.T) @ h,
    "transposed and back": lambda h: (h @ torch.ones(6, 5)).transpose(0, 1) @ torch.ones(5, 6),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "softmax over samples": lambda h: h * h.softmax(0),
    "cumsum over samples": lambda h: h.cumsum(0),
    "contrastive": lambda h: h + F.normalize(h, dim=0),
}


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("feature", CURVATURE)
def test_samples_mix(name: str, feature: Any) -> None:
    model = extend(Wired(lambda m, x: m.b(MIXES[name](m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    loss = extend(nn.CrossEntropyLoss())
    refused(lambda: loss(model(x), y), model, feature(), (ValueError, NotImplementedError))


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("feature", FIRST_ORDER)
def test_samples_mix_for_individual_gradients(name: str, feature: Any) -> None:
    """Individual gradients do not exist either; δ of a sample would hold parts of the others."""
    model = extend(Wired(lambda m, x: m.b(MIXES[name](m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    loss = extend(nn.CrossEntropyLoss())
    refused(lambda: loss(model(x), y), model, feature(), (ValueError, NotImplementedError))


@pytest.mark.parametrize("feature", FEATURES)
def test_batch_norm_in_training(feature: Any) -> None:
    """Says that individual quantities do not exist, and the remedies."""
    for affine in (True, False):
        model, loss = extend(sequence(nn.BatchNorm1d(6, affine=affine))), extend(nn.CrossEntropyLoss())
        refused(
            lambda: loss(model(x), y),  # noqa: B023
            model,
            feature(),
            (NotImplementedError, ValueError),
            "batch",
            "eval",
            "GroupNorm",
        )


def test_batch_norm_in_evaluation_without_parameters() -> None:
    model, loss = extend(sequence(nn.BatchNorm1d(6, affine=False).eval())), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad(), DiagGGNExact()):
        loss(model(x), y).backward()
    torch.testing.assert_close(model[0].weight.grad_batch.sum(0), model[0].weight.grad)


@pytest.mark.parametrize("feature", FEATURES)
def test_batch_axis_lost(feature: Any) -> None:
    """Positions flattened into the batch: the layers disagree on what a sample is."""
    inputs = torch.randn(5, 2, 4)
    model = extend(Wired(tokens_as_samples, a=nn.Linear(4, 6), act=nn.Tanh(), b=nn.Linear(6, 3)))
    loss = extend(nn.CrossEntropyLoss())
    refused(
        lambda: loss(model(inputs), torch.zeros(10, dtype=torch.long)),
        model,
        feature(),
        ValueError,
        "batch",
        "axis",
        "(10",
    )


@pytest.mark.parametrize("feature", CURVATURE)
def test_mean_over_the_batch_before_the_loss(feature: Any) -> None:
    model = extend(Wired(lambda m, x: m.b(m.a(x)).mean(0, keepdim=True), a=nn.Linear(4, 6), b=nn.Linear(6, 3)))
    loss = extend(nn.MSELoss())
    refused(lambda: loss(model(x), torch.zeros(1, 3)), model, feature(), ValueError, "batch")


@pytest.mark.parametrize("feature", [feature for feature in FEATURES if feature.__name__ in SECOND_ORDER])
def test_batch_axis_second(feature: Any) -> None:
    """Second derivatives want the batch first."""
    model = extend(
        Wired(lambda m, x: m.b(m.a(x.transpose(0, 1))).transpose(0, 1), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    )
    loss = extend(nn.MSELoss())
    inputs = torch.randn(5, 2, 4)
    refused(lambda: loss(model(inputs), torch.zeros(5, 2, 3)), model, feature(), ValueError, "batch")


# --- losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", CURVATURE)
@pytest.mark.parametrize("factor", [-1.0, float("nan")])
def test_negative_multiple_of_a_loss(feature: Any, factor: float) -> None:
    model, loss = extend(sequence()), extend(nn.CrossEntropyLoss())
    refused(lambda: factor * loss(model(x), y), model, feature(), ValueError, feature.__name__, "positive")


@pytest.mark.parametrize("feature", FIRST_ORDER)
def test_negative_multiple_is_fine_for_gradients(feature: Any) -> None:
    model, loss = extend(sequence()), extend(nn.CrossEntropyLoss())
    with backpack(feature()):
        (-loss(model(x), y)).backward()
    assert all(hasattr(p, feature.field) for p in model.parameters())


@pytest.mark.parametrize("feature", CURVATURE)
def test_target_that_broadcasts(feature: Any) -> None:
    model, loss = extend(sequence()), extend(nn.MSELoss())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(lambda: loss(model(x), torch.zeros(1, 3)), model, feature(), ValueError, "MSELoss")


@pytest.mark.parametrize("feature", CURVATURE)
def test_loss_without_batch(feature: Any) -> None:
    """CrossEntropyLoss of one vector of logits has no batch axis."""
    model, loss = extend(sequence()), extend(nn.CrossEntropyLoss())
    refused(lambda: loss(model(x)[0], y[0]), model, feature(), ValueError, "CrossEntropyLoss", "batch")


# --- tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
def test_overwritten_input(feature: Any) -> None:
    model, loss = extend(sequence(nn.Tanh())), extend(nn.CrossEntropyLoss())
    inputs = x.clone()

    def run() -> Tensor:
        value = loss(model(inputs), y)
        inputs.mul_(2)
        return value

    refused(run, model, feature(), RuntimeError, "place")


@pytest.mark.parametrize("feature", CURVATURE)
def test_overwritten_parameter(feature: Any) -> None:
    model, loss = extend(sequence(nn.Tanh())), extend(nn.CrossEntropyLoss())

    def run() -> Tensor:
        value = loss(model(x), y)
        with torch.no_grad():
            model[2].weight.mul_(2)
        return value

    refused(run, model, feature(), RuntimeError, "place")


@pytest.mark.parametrize("feature", CURVATURE)
def test_memory_limit(feature: Any) -> None:
    """Below one column of a factor, or KFRA's averaged matrix, which cannot be split: an estimate before anything is computed."""
    model, loss = extend(nn.Sequential(nn.Linear(4, 100), nn.Tanh(), nn.Linear(100, 3))), extend(nn.CrossEntropyLoss())
    with satchel.settings(memory_limit=1000):
        refused(lambda: loss(model(x), y), model, feature(), MemoryError, feature.__name__, "memory_limit", "bytes")


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_shows_as_nan(feature: Any, value: float) -> None:
    """A number that is not one spreads as in autograd; it is no error and hides no sample but its own."""
    model, loss = extend(sequence(nn.Tanh())), extend(nn.MSELoss())
    inputs = x.clone()
    inputs[1, 2] = value
    with backpack(feature()):
        loss(model(inputs), torch.zeros(5, 3)).backward()
    fields = [getattr(p, feature.field) for p in model.parameters()]
    flat = torch.cat([t.flatten() for f in fields for t in (f if isinstance(f, list) else [f])])
    assert not flat.isfinite().all()
    if feature is BatchGrad:
        others = [0, 2, 3, 4]
        assert all(f[others].isfinite().all() for f in fields)
