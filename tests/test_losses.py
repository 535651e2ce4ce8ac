"""Every loss with its options on a small network: against dense autograd of torch's loss, and its Fisher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Linear, LogSoftmax, Sigmoid

from conftest import KERNELS, Agree, Pass
from losses import BY_NAME, CASES, EXACT, LIKELIHOODS, SAMPLED, LossCase, all_cases, expected, likelihoods, start
from reference import Reference, contributions
from satchel import backpack, extend
from satchel.extensions import BatchGrad, DiagGGNExact, DiagGGNMC, DiagHessian
from satchel.registry import REGISTRY
from satchel.runtime.evaluate import evaluate
from satchel.runtime.record import entries
from satchel.runtime.torch_private import weight_of_targets
from satchel_gen.calculus.likelihood import likelihood

# --- agreement ---------------------------------------------------------------------------------------------------


@all_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_features(case: LossCase, dtype: torch.dtype, agree: Agree) -> None:
    done = Pass(case, dtype, "aten", *(feature() for feature in EXACT))
    for feature in EXACT:
        agree(done.fields(feature), expected(case, feature))


@likelihoods
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sampled_features(case: LossCase, dtype: torch.dtype, agree: Agree) -> None:
    """What was drawn is read off a probe at the output: given that, the fields are exact."""
    features = [feature(mc_samples=2, generator=torch.Generator().manual_seed(0)) for feature in SAMPLED]
    done = Pass(case, dtype, "aten", *features, reveal=True)
    drawn = done.model.curvature(done.model.probe.weight.diag_ggn_mc)
    assert drawn.abs().sum() > 0
    for feature in SAMPLED:
        agree(done.fields(feature), expected(case, feature, curvature=drawn))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", [loss.name for loss in REGISTRY.losses if loss.kernels])
def test_kernels(name: str, backend: str, agree: Agree) -> None:
    for k in range(len(BY_NAME[name].examples)):
        case = LossCase(name, k, "mean")
        done = Pass(case, torch.float32, backend, *(feature() for feature in EXACT))
        for feature in EXACT:
            agree(done.fields(feature), expected(case, feature))
        if case in LIKELIHOODS:
            done = Pass(case, torch.float32, backend, *(feature() for feature in SAMPLED), reveal=True)
            drawn = done.model.curvature(done.model.probe.weight.diag_ggn_mc)
            for feature in SAMPLED:
                agree(done.fields(feature), expected(case, feature, curvature=drawn))


def test_divisors_that_autograd_keeps() -> None:
    """A rule gives what the loss's node has divided by, where the node keeps that, in full precision."""
    seen = set()
    for case in CASES:
        value = extend(case.criterion())(case.network.model()(case.network.input()), case.target(), *case.more())
        (loss,) = entries(value.grad_fn).losses
        known, rule = weight_of_targets(value.grad_fn), loss.definition.reductions["mean"]
        if known is not None and case.reduction == "mean":
            seen.add((case.name, value.grad_fn.name()))
            torch.testing.assert_close(evaluate(rule, loss.definition, loss.operand), known)
    assert {node for _, node in seen} == {"NllLossBackward0", "NllLoss2DBackward0"}
    assert {name for name, _ in seen} >= {"CrossEntropyLoss", "CrossEntropyLossWeighted", "NLLLoss"}
    half = nn.CrossEntropyLoss()(torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True), torch.tensor([0, 1, 1]))
    assert weight_of_targets(half.grad_fn) is None


@pytest.mark.parametrize("name", BY_NAME)
def test_table5(name: str, agree: Agree) -> None:
    case = LossCase(name, 0, "mean")
    done = Pass(case, torch.float64, "aten", DiagGGNExact(scaling="table5"), DiagHessian(scaling="table5"))
    for feature in (DiagGGNExact, DiagHessian):
        agree(done.fields(feature), expected(case, feature, scaling="table5"))


@pytest.mark.parametrize("name", BY_NAME)
def test_no_reduction_with_own_weights(name: str, agree: Agree) -> None:
    """`(loss * w).sum()` weights the curvature of each term."""
    case, dtype = LossCase(name, 0, "none"), torch.float64
    given = [t.to(dtype) if t.is_floating_point() else t for t in (case.target(), *case.more())]
    plain = case.criterion().to(dtype)
    weights = torch.linspace(
        0.2, 1.5, plain(case.network.model().double()(case.network.input().double()), *given).numel()
    )

    def weighted(terms: Tensor) -> Tensor:
        return terms * weights.double().view(terms.shape)

    def per_sample(output: Tensor) -> Tensor:
        return weighted(plain(output, *given)).reshape(case.batch, -1).sum(1)

    reference = Reference(case.network.model(), [case.network.input()], [per_sample])
    model, loss = extend(case.network.model().double()), extend(case.criterion().to(dtype))
    with backpack(*(feature() for feature in EXACT)):
        weighted(loss(model(case.network.input().double()), *given)).sum().backward()
    for feature in EXACT:
        fields = {name: getattr(p, feature.field) for name, p in model.named_parameters()}
        agree(fields, {name: reference.field(feature.__name__, name) for name in reference.parameters})


# --- Monte Carlo --------------------------------------------------------------------------------------------------


def fisher(case: LossCase) -> dict[str, Tensor]:
    """diag of Σ_n J_nᵀ F_n J_n: F is ∇²ℓ where the definition says so, else in closed form."""
    reference = case.reference()
    if likelihood(case.definition).fisher:
        return expected(case, DiagGGNExact)
    if case.module is nn.NLLLoss:  # log_softmax and NLLLoss are the cross entropy of the logits
        own = case.criterion()
        logits = nn.CrossEntropyLoss(weight=own.weight, ignore_index=own.ignore_index, reduction=case.reduction)
        terms = contributions(logits, case.target())
        whole = Reference(case.network.model(), [case.network.input()], [terms])
        return {name: whole.DiagGGNExact(name) for name in whole.parameters}
    f = reference.outputs[0].detach()
    weight = case.criterion().double().weight if case.module is nn.BCELoss else None
    closed: dict[type[nn.Module], Callable[[], Tensor]] = {
        nn.L1Loss: lambda: torch.ones_like(f),
        nn.BCELoss: lambda: (1.0 if weight is None else weight) / (f * (1 - f)),
        nn.PoissonNLLLoss: lambda: 1 / f,
    }
    diagonal = closed[case.module]() / (f.numel() if case.reduction == "mean" else 1)
    curvature = torch.diag_embed(diagonal.flatten(1))
    return expected(case, DiagGGNExact, curvature=curvature)


@likelihoods
def test_monte_carlo_estimates_the_fisher(case: LossCase) -> None:
    """Over 24 passes of 100 samples, the mean is within 6 of its standard errors."""
    network = case.network.model()
    if case.module is nn.NLLLoss:
        network.link = LogSoftmax(1)
    model, loss = extend(network.double()), extend(case.criterion().double())
    given = [t.double() if t.is_floating_point() else t for t in (case.target(), *case.more())]
    feature = DiagGGNMC(mc_samples=100, generator=torch.Generator().manual_seed(1))
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for _ in range(24):
        with backpack(feature):
            loss(model(case.network.input().double()), *given).backward()
        for name, p in model.named_parameters():
            seen[name].append(p.diag_ggn_mc.clone())
    for name, want in fisher(case).items():
        values = torch.stack(seen[name])
        error = (values.mean(0) - want).abs()
        bias = 3e-3 * want.abs().max()  # of the closed form for PoissonNLLLoss, which leaves eps out
        assert (error <= 6 * values.std(0) / 24**0.5 + bias).all(), (name, values.mean(0), want)
    assert any(torch.stack(values).std(0).max() > 0 for values in seen.values()), "nothing was drawn"


def test_which_fisher_is_the_hessian() -> None:
    """As the literature has it: canonical exponential families, not those in probabilities, rates or absolute values."""
    assert {name for name, d in BY_NAME.items() if likelihood(d).fisher} == {
        "BCEWithLogitsLoss", "CrossEntropyLoss", "CrossEntropyLossProbabilities", "CrossEntropyLossWeighted", "GaussianNLLLoss",
        "MSELoss", "PoissonNLLLoss", "SoftMarginLoss",
    }  # fmt: skip


# --- numbers ------------------------------------------------------------------------------------------------------


EXTREME: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "CrossEntropyLoss": (nn.CrossEntropyLoss, torch.tensor([2])),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, torch.tensor([[0.0, 1.0, 0.3, 1.0, 0.0]])),
    "SoftMarginLoss": (nn.SoftMarginLoss, torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0]])),
    "HuberLoss": (nn.HuberLoss, torch.zeros(1, 5)),
    "SmoothL1Loss": (nn.SmoothL1Loss, torch.zeros(1, 5)),
    "MSELoss": (nn.MSELoss, torch.zeros(1, 5)),
    "L1Loss": (nn.L1Loss, torch.zeros(1, 5)),
}


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits_are_finite_and_right(name: str) -> None:
    """At ±1e4 in float32: finite, and what float64 gives."""
    build, target = EXTREME[name]
    f = torch.tensor([[1e4, -1e4, 1e4 - 1, 0.0, 25.0]])
    features = (DiagGGNExact(), DiagHessian(), BatchGrad())
    single = start(build(), f, target, features=features)
    wide = target.double() if target.is_floating_point() else target
    double = start(build(), f.double(), wide, features=features)
    for field in ("diag_ggn_exact", "diag_h", "grad_batch"):
        value, want = getattr(single.bias, field), getattr(double.bias, field)
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-12)


def test_saturated_logits_keep_their_digits() -> None:
    """σ'(20) = 2e-9, where 1 − σ(20) has none in float32."""
    f = torch.tensor([[20.0, -20.0, 12.0]])
    for target in (torch.ones(1, 3), torch.zeros(1, 3)):
        got = start(nn.BCEWithLogitsLoss(reduction="sum"), f, target).bias.diag_ggn_exact
        want = torch.sigmoid(f.double()) * torch.sigmoid(-f.double())
        torch.testing.assert_close(got.double(), want[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("y", [0.0, 0.3, 1.0])
def test_probabilities_of_zero_and_one(y: float) -> None:
    """BCELoss of a saturated sigmoid: as finite as torch's gradient."""
    layer: Any = extend(nn.Sequential(Linear(1, 2, bias=False), Sigmoid()))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[200.0], [-200.0]]))
    with backpack(DiagGGNExact(), DiagHessian(), BatchGrad()):
        extend(nn.BCELoss())(layer(torch.ones(1, 1)), torch.full((1, 2), y)).backward()
    for field in ("diag_ggn_exact", "diag_h", "grad_batch"):
        assert getattr(layer[0].weight, field).isfinite().all()


@pytest.mark.parametrize("shape", [(), (1,), (3, 1)])
def test_variance_of_fewer_axes(shape: tuple[int, ...], agree: Agree) -> None:
    """[N] stands for [N, 1], a number for all; N = D shows that the batch axis is meant."""
    variance: Any = torch.linspace(0.5, 2, 3).double().view(3, *shape[1:]) if shape else 0.7
    model = extend(Linear(2, 3).double())
    x, y = torch.randn(3, 2).double(), torch.randn(3, 3).double()
    with backpack(DiagGGNExact()):
        extend(nn.GaussianNLLLoss())(model(x), y, variance).backward()
    dense = (variance.view(3, 1) if shape else variance) * torch.ones(3, 3).double()
    agree({"bias": model.bias.diag_ggn_exact}, {"bias": (1 / dense).sum(0) / 9})


def test_both_spellings_of_the_arguments() -> None:
    """The first argument of PoissonNLLLoss has a name of its own."""
    model = extend(Linear(1, 2))
    with backpack(DiagGGNExact()):
        extend(nn.PoissonNLLLoss())(target=torch.ones(1, 2), log_input=model(torch.ones(1, 1))).backward()
    assert model.bias.diag_ggn_exact.shape == (2,)


def test_definitions_are_short() -> None:
    for definition in BY_NAME.values():
        assert len(definition.source.file.read_text().splitlines()) <= 40
