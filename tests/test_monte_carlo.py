"""Sampled curvature: its distribution, its random state, and what the features of one pass share."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from cases import Case, Network
from conftest import FEATURES, LOSSES, Pass, is_sampled, label
from networks import NETWORKS
from satchel import backpack, extend
from satchel.extensions import KFAC, DiagGGNExact, DiagGGNMC
from satchel.registry import REGISTRY
from satchel.runtime.sampling import categorical

SAMPLED = [feature for feature in FEATURES if is_sampled(feature)]
BY_NAME = {network.name: network for network in NETWORKS}


class Moments(NamedTuple):
    """Mean and variance of a field for one Monte-Carlo sample."""

    mean: Tensor
    variance: Tensor


def outcomes(case: Case) -> list[tuple[Tensor, Tensor]]:
    """All values of (∂ℓ/∂f)·√c of a classification loss with their probabilities: [N, F] and [N] each."""
    output = case.reference().outputs[0].detach()
    f = case.arranged(output)
    N, C, *positions = f.shape
    scale = 1 / (N * math.prod(positions)) if case.reduction == "mean" else 1.0
    log_p = f.log_softmax(1)
    found = []
    for choice in itertools.product(range(C), repeat=math.prod(positions)):
        target = torch.tensor(choice).view(1, *positions).expand(N, *positions)
        onehot = nn.functional.one_hot(target, C).movedim(-1, 1)
        slope = (log_p.exp() - onehot).movedim(1, case.network.classes).flatten(1)
        found.append((slope * scale**0.5, (onehot * log_p).flatten(1).sum(1).exp()))
    return found


def moments(case: Case, J: Tensor) -> Moments:
    """Of Σ_n (J_nᵀ s_n)², J [N, F, P], for s_n = √c ∂ℓ(f_n, ŷ)/∂f_n: exact."""
    if issubclass(case.loss, nn.CrossEntropyLoss):
        pairs = [(torch.einsum("nfp,nf->np", J, s).square(), p) for s, p in outcomes(case)]
        mean = torch.stack([p[:, None] * t for t, p in pairs]).sum(0)
        square = torch.stack([p[:, None] * t.square() for t, p in pairs]).sum(0)
        return Moments(mean.sum(0), (square - mean.square()).sum(0))
    scale = 1 / case.reference().outputs[0].numel() if case.reduction == "mean" else 1.0
    mean = 2 * scale * J.square().sum(1)  # ∂ℓ/∂f = 2(f − ŷ) ~ N(0, 2)
    return Moments(mean.sum(0), 2 * mean.square().sum(0))


@pytest.mark.parametrize(
    "name", ["sigmoid_tanh", "one_position", "siamese", "frozen_some", "mean_pool", "split", "sequence"]
)
def test_mean_is_the_fisher(name: str, loss: Any, reduction: str) -> None:
    """z-test of every entry: |value − E| ≤ 5 standard errors."""
    case, M = Case(BY_NAME[name], loss, reduction), 4000
    done = Pass(case, torch.float64, "aten", DiagGGNMC(mc_samples=M, generator=torch.Generator().manual_seed(0)))
    reference = case.reference()
    for p, value in done.fields(DiagGGNMC).items():
        mean, variance = moments(case, reference.jacobians[p].flatten(2))
        torch.testing.assert_close(mean, reference.DiagGGNExact(p).flatten())  # for these losses the Fisher is the GGN
        error = (value.flatten() - mean).abs()
        assert (error <= 5 * (variance / M).sqrt() + 1e-12 * mean.max()).all(), p
        assert variance.max() == 0 or error.max() > 0, "a sampled field that is exact was not sampled"


@pytest.mark.parametrize("M", [1, 2])
def test_classes_are_drawn_as_often_as_their_probability(M: int) -> None:
    """Within 5 standard errors over 20,000 rows; what has none never is."""
    p, rows = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05]), 20_000
    generator, state = torch.Generator().manual_seed(0), torch.get_rng_state()
    drawn = categorical(p.expand(2, rows // 2, -1), M, generator)
    assert drawn.shape == (M, 2, rows // 2) and torch.equal(torch.get_rng_state(), state)
    counted = torch.bincount(drawn.flatten(), minlength=len(p)) / drawn.numel()
    assert ((counted - p).abs() <= 5 * (p * (1 - p) / drawn.numel()).sqrt()).all()


@pytest.mark.parametrize("M", [1, 2, 50])
def test_variance_falls_with_the_samples(M: int) -> None:
    """The spread over 300 passes is that of independent samples: within 5 standard errors of Var/M (fourth moments ≤ 15 σ⁴)."""
    case, passes = Case(BY_NAME["linear"], nn.MSELoss, "mean"), 300
    generator = torch.Generator().manual_seed(0)
    model: Any = extend(case.network.model().double())
    loss = extend(case.criterion())
    values = []
    for _ in range(passes):
        with backpack(DiagGGNMC(mc_samples=M, generator=generator)):
            loss(model(case.network.input().double()), case.target().double()).backward()
        values.append(model.bias.diag_ggn_mc.clone())
    _, variance = moments(case, case.reference().jacobians["bias"].flatten(2))
    spread = torch.stack(values).var(0) * M / variance
    assert ((spread - 1).abs() < 5 * math.sqrt(15 / passes)).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_categorical_sample_is_an_outcome(reduction: str) -> None:
    """M = 1: every sample's S Sᵀ has rank one and belongs to one class, and all classes occur."""
    network = Network("wide", lambda: nn.Linear(4, 3), (40, 4))
    case = Case(network, nn.CrossEntropyLoss, reduction)
    done = Pass(case, torch.float64, "aten", DiagGGNMC(), reveal=True)
    drawn = done.model.curvature(done.model.probe.weight.diag_ggn_mc)
    assert (torch.linalg.matrix_rank(drawn, rtol=1e-8) == 1).all()
    possible = torch.stack([s[:, :, None] * s[:, None] for s, _ in outcomes(case)], 1)  # [N, C, F, F]
    distance = (possible - drawn[:, None]).abs().amax((2, 3))
    nearest, which = distance.min(1)
    assert nearest.max() < 1e-12
    assert set(which.tolist()) == {0, 1, 2}


def test_one_normal_sample_has_rank_one() -> None:
    case = Case(BY_NAME["sequence"], nn.MSELoss, "sum")
    for M in (1, 2):
        done = Pass(case, torch.float64, "aten", DiagGGNMC(mc_samples=M), reveal=True)
        drawn = done.model.curvature(done.model.probe.weight.diag_ggn_mc)
        assert (torch.linalg.matrix_rank(drawn, rtol=1e-8) == M).all()


@pytest.mark.parametrize("name", ["relu", "double_skip", "branches"])
@pytest.mark.parametrize("mc_samples", [1, 4])
def test_features_of_a_pass_share_the_sample(name: str, loss: Any, mc_samples: int) -> None:
    """The output factor of a layer without further positions has the bias's diagonal on its diagonal."""
    case = Case(BY_NAME[name], loss, "mean")
    done = Pass(case, torch.float64, "aten", DiagGGNMC(mc_samples), KFAC(mc_samples))
    for p, used in ((p, case.reference().uses_of(n)) for n, p in done.network.named_parameters() if p.ndim == 1):
        if len(used) == 1:
            torch.testing.assert_close(p.diag_ggn_mc, p.kfac[0].diagonal())


def test_different_sample_counts_do_not_share() -> None:
    """M = 1 has rank one at the output of a single sample; M = 3 in the same pass has not."""
    case = Case(Network("one", lambda: nn.Linear(4, 3), (1, 4)), nn.MSELoss, "mean")
    done = Pass(case, torch.float64, "aten", DiagGGNMC(mc_samples=1), KFAC(mc_samples=3))
    B = done.network.bias.kfac[0]
    assert torch.linalg.matrix_rank(B, rtol=1e-8) == 3
    assert not torch.allclose(done.network.bias.diag_ggn_mc, B.diagonal())


@pytest.mark.parametrize("feature", SAMPLED)
def test_same_seed_same_numbers(feature: Any, loss: Any, backend: str) -> None:
    case = Case(BY_NAME["sequence"], loss, "mean")

    def once(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        fields = Pass(case, torch.float64, backend, feature(mc_samples=2, generator=generator)).fields(feature)
        return [t for v in fields.values() for t in (v if isinstance(v, list) else [v])]

    assert all(torch.equal(a, b) for a, b in zip(once(7), once(7), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(once(7), once(8), strict=True))


@pytest.mark.parametrize("feature", SAMPLED)
def test_generator_moves_and_the_global_state_does_not(feature: Any, loss: Any) -> None:
    case = Case(BY_NAME["relu"], loss, "mean")
    generator = torch.Generator().manual_seed(0)
    before, own = torch.get_rng_state(), generator.get_state()
    Pass(case, torch.float64, "aten", feature(generator=generator))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(generator.get_state(), own)
    Pass(case, torch.float64, "aten", feature())
    assert not torch.equal(torch.get_rng_state(), before), "without a generator the global state is used"


def test_exact_features_do_not_draw(feature: Any) -> None:
    if is_sampled(feature):
        pytest.skip("draws")
    before = torch.get_rng_state()
    Pass(Case(BY_NAME["relu"], nn.CrossEntropyLoss, "mean"), torch.float64, "aten", feature())
    assert torch.equal(torch.get_rng_state(), before)


def test_global_seed_reproduces(loss: Any) -> None:
    case = Case(BY_NAME["relu"], loss, "mean")
    with torch.random.fork_rng():
        values = []
        for _ in range(2):
            torch.manual_seed(5)
            values.append(Pass(case, torch.float64, "aten", DiagGGNMC()).network[0].weight.diag_ggn_mc)
    assert torch.equal(*values)


def test_loss_far_from_the_target_does_not_matter() -> None:
    """The Fisher does not see the targets."""
    case = Case(BY_NAME["relu"], nn.MSELoss, "mean")
    values = []
    for shift in (0.0, 1e6):
        model: Any = extend(case.network.model().double())
        loss = extend(case.criterion())
        generator = torch.Generator().manual_seed(0)
        with backpack(DiagGGNMC(generator=generator), DiagGGNExact()):
            loss(model(case.network.input().double()), case.target().double() + shift).backward()
        values.append((model[0].weight.diag_ggn_mc, model[0].weight.diag_ggn_exact))
    torch.testing.assert_close(values[0], values[1], rtol=1e-8, atol=0)


# --- the emitted rules of the losses, for fixed samples -----------------------------------------------------------


@pytest.mark.parametrize("definition", [d for d in REGISTRY.losses if d.name in map(label, LOSSES)], ids=label)
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (1, 2)])
def test_emitted_factors(definition: Any, shape: tuple[int, ...]) -> None:
    """S Sᵀ = ∂²(Σℓ)/∂f²; the sampled factor is the gradient at the sample; samples have the target's shape."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    loss = definition.module(reduction="sum")
    categorical = len(definition.target_axes) < len(definition.input_axes)

    def call(rule: Any, *explicit: Any, target: Tensor | None = None) -> Tensor:
        known = {"input": flat(f.detach()), "target": target}
        return rule.aten(*explicit, *(known[name] for name in rule.operands))

    def flat(t: Tensor) -> Tensor:  # canonical: n, k, r* of a classification; n, j* otherwise
        return t.flatten(2) if categorical and t.ndim > 2 else t.unsqueeze(2) if categorical else t.flatten(1)

    M = 6
    drawn = call(definition.sample, M, generator)
    target_shape = (shape[0], *shape[2:]) if categorical else shape
    assert drawn.shape[0] == M and drawn[0].numel() == math.prod(target_shape)
    factor = call(definition.mc_factor, drawn, target=drawn[0].reshape(shape[0], -1))
    for m in range(M):
        y = drawn[m].reshape(target_shape)
        (slope,) = torch.autograd.grad(loss(f, y), f)
        torch.testing.assert_close(factor[m].reshape(shape), slope)

    y = drawn[0].reshape(target_shape)
    canonical_y = y.reshape(shape[0], -1)
    (slope,) = torch.autograd.grad(loss(f, y), f, create_graph=True)
    torch.testing.assert_close(call(definition.gradient, target=canonical_y).reshape(shape), slope.detach())
    hessian = torch.stack([torch.autograd.grad(g, f, retain_graph=True)[0].flatten() for g in slope.flatten()])
    S = call(definition.exact_factor, target=canonical_y).reshape(-1, *shape)
    per_sample = torch.einsum("vni,vnj->nij", S.flatten(2), S.flatten(2))
    torch.testing.assert_close(torch.block_diag(*per_sample), hessian)
