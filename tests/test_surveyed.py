"""Of passes over graphs of one structure the first alone is surveyed; whatever differs is surveyed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures import ARCHITECTURES
from cases import Case, Network, Wired
from conftest import Pass, label
from satchel import backpack, extend, settings
from satchel.extensions import BatchGrad, DiagGGNExact, DiagHessian
from satchel.runtime import backward, structure, survey
from satchel.runtime.errors import LossNotExtended, MemoryLimit, Overwritten, SatchelError
from satchel.runtime.plan import Plan, walk
from satchel.runtime.record import Record

N = 5


@pytest.fixture
def surveys(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each plan that is surveyed."""
    seen: list[int] = []
    own = survey._survey

    def counted(plan: Any, *rest: Any) -> Any:
        seen.append(len(plan.steps))
        return own(plan, *rest)

    monkeypatch.setattr(survey, "_survey", counted)
    return seen


def model_of(between: Callable[[Tensor], Tensor]) -> nn.Module:
    """As many hidden units as samples: shapes do not tell them apart."""
    return extend(Wired(lambda m, x: m.b(between(m.a(x))), a=nn.Linear(4, N), b=nn.Linear(N, 3)).double())


def step(model: nn.Module, feature: Any, samples: int = N) -> dict[str, Tensor]:
    x = torch.randn(samples, 4, dtype=torch.float64)
    loss = extend(nn.CrossEntropyLoss())(model(x), torch.arange(samples) % 3)
    with backpack(feature):
        loss.backward()
    return {name: getattr(p, feature.field) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("feature", [BatchGrad, DiagGGNExact])
def test_the_same_structure_is_surveyed_once(feature: Any, surveys: list[int]) -> None:
    table5 = feature(scaling="table5")  # features that no other test has asked for
    model = model_of(lambda h: h.softmax(1).relu() + 1)
    for _ in range(3):
        step(model, table5)
    assert len(surveys) == 1
    step(model, feature(scaling="table5"), samples=N + 1)
    assert len(surveys) == 2
    step(model_of(lambda h: h.softmax(1).relu() + 1), table5)  # other parameters, in the same places
    assert len(surveys) == 2


#: Operations of one name on tensors of one shape, of which the second mixes samples.
ALIKE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softmax": (lambda h: h.softmax(1), lambda h: h.softmax(0)),
    "log_softmax": (lambda h: h.log_softmax(-1), lambda h: h.log_softmax(-2)),
    "sum": (lambda h: h + h.sum(1, keepdim=True), lambda h: h + h.sum(0, keepdim=True)),
    "mean": (lambda h: h - h.mean(1, keepdim=True), lambda h: h - h.mean(0, keepdim=True)),
    "transpose": (lambda h: h.unsqueeze(1).transpose(1, 2).squeeze(2), lambda h: h.transpose(0, 1)),
    "permute": (lambda h: h.permute(0, 1), lambda h: h.permute(1, 0)),
    "unbind": (lambda h: h.unsqueeze(1).unbind(1)[0], lambda h: torch.stack(h.unbind(0)[::-1])),
    "index": (lambda h: h[[0, 1, 2, 3, 4]], lambda h: h[[1, 2, 3, 4, 0]]),
    "edges": (
        lambda h: h + h.transpose(0, 1).relu().transpose(0, 1),
        lambda h: h.transpose(0, 1) + h.transpose(0, 1).relu(),
    ),
    "targets of edges": (
        lambda h: h.transpose(0, 1).transpose(0, 1) + h.relu(),
        lambda h: (lambda turned: turned.transpose(0, 1) + turned.relu())(h.transpose(0, 1)),
    ),
    "matrix": (lambda h: torch.eye(N).double() @ h, lambda h: torch.ones(N, N).double() @ h),
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("feature", [BatchGrad, DiagGGNExact])
def test_what_mixes_samples_is_found_after_what_does_not(name: str, feature: Any) -> None:
    apart, mixed = ALIKE[name]
    for _ in range(2):
        step(model_of(apart), feature())
    for _ in range(2):
        with pytest.raises(SatchelError):
            step(model_of(mixed), feature())
    step(model_of(apart), feature())


@pytest.mark.parametrize("network", ARCHITECTURES, ids=label)
@pytest.mark.parametrize("feature", [BatchGrad, DiagGGNExact])
def test_a_recognised_plan_is_the_one_of_a_walk(
    network: Network, feature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, plans = backward.recognised, []

    def compared(start: Any, outline: Any, wanted: Any, surveys: Any) -> Any:
        plan = own(start, outline, wanted, surveys)
        if plan is not None:
            plans.append(plan)
            walked = walk(start, wanted)
            assert parts(plan) == parts(walked)
            assert plan.nodes == walked.nodes
            assert plan.definitions == walked.definitions
            assert plan.parameters.keys() == walked.parameters.keys()
            assert plan.tied.keys() == walked.tied.keys()
        return plan

    monkeypatch.setattr(backward, "recognised", compared)
    first, second = (
        Pass(Case(network, nn.CrossEntropyLoss, "sum"), torch.float64, "aten", feature()).fields(feature)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    if not plans:
        pytest.skip("a survey of this network reads values")


def parts(plan: Plan) -> list[Any]:
    return [(s.node, s.record, s.inputs, [c.parameters.keys() for c in s.calls]) for s in plan.steps]


def test_a_survey_without_a_loss_is_none_of_one_below_a_loss() -> None:
    """What a loss would ask has not been looked at."""
    model, x = model_of(lambda h: h), torch.randn(N, 4, dtype=torch.float64)
    targets = torch.arange(N) % 3
    with settings(memory_limit=8):
        with pytest.raises(LossNotExtended), backpack(DiagGGNExact()):
            nn.CrossEntropyLoss()(model(x), targets).backward()
        with pytest.raises(MemoryLimit), backpack(DiagGGNExact()):
            extend(nn.CrossEntropyLoss())(model(x), targets).backward()


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_a_frozen_parameter_is_not_an_absent_one(order: tuple[bool, bool]) -> None:
    """A rule of the layer reads it, so it must not have been overwritten."""
    for affine in order:
        norm = nn.LayerNorm(N, elementwise_affine=affine).double().requires_grad_(False)
        model = extend(nn.Sequential(nn.Linear(4, N), norm, nn.Linear(N, 3)).double())
        step(model, DiagGGNExact(scaling="table5"))
        step(model, DiagGGNExact(scaling="table5"))
        if affine:
            loss = extend(nn.CrossEntropyLoss())(model(torch.randn(N, 4).double()), torch.arange(N) % 3)
            with torch.no_grad():
                norm.weight.mul_(2)
            with pytest.raises(Overwritten), backpack(DiagGGNExact(scaling="table5")):
                loss.backward()


def test_columns_of_another_dtype_are_another_survey() -> None:
    """What a limit is compared with."""
    model = model_of(lambda h: h)
    with settings(memory_limit=4 * (N * N + N * 3)):
        step(model, DiagGGNExact())
        torch.set_default_dtype(torch.float64)
        try:
            with pytest.raises(MemoryLimit):
                step(model, DiagGGNExact())
        finally:
            torch.set_default_dtype(torch.float32)


def test_another_limit_is_another_survey() -> None:
    """An exact block that was allowed before."""
    feature = DiagHessian
    model = model_of(lambda h: h)
    step(model, feature())
    with settings(memory_limit=8), pytest.raises(MemoryLimit):
        step(model, feature())
    step(model, feature())


def test_options_of_modules_may_change() -> None:
    """Between passes: what one option allows, another refuses."""
    model = extend(nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3)).double())
    loss_function, x = extend(nn.CrossEntropyLoss()), torch.tensor([[0, 1], [2, 3], [4, 6]])

    def run() -> None:
        loss = loss_function(model(x), torch.tensor([0, 1, 2]))
        with backpack(BatchGrad()):
            loss.backward()

    run()
    model[0].scale_grad_by_freq = True
    with pytest.raises(SatchelError, match="scale_grad_by_freq"):
        run()
    model[0].scale_grad_by_freq = False
    run()


def test_an_option_that_is_no_value(monkeypatch: pytest.MonkeyPatch, surveys: list[int]) -> None:
    """It cannot be looked up, so every pass is surveyed."""
    monkeypatch.setattr(Record, "structure", property(lambda record: ([record.input_shape],)))
    model = model_of(lambda h: h)
    for _ in range(2):
        step(model, BatchGrad())
    assert len(surveys) == 2


def test_memory_of_structures_is_bounded(monkeypatch: pytest.MonkeyPatch, surveys: list[int]) -> None:
    monkeypatch.setattr(structure, "_MOST", 2)
    model, feature = model_of(lambda h: h), BatchGrad(scaling="table5")
    for samples in (7, 8, 9, 7):
        step(model, feature, samples)
    assert len(surveys) == 4
