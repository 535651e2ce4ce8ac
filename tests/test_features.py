"""Every feature of every parameter against dense autograd: networks × losses × reductions × precisions × backends."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from cases import Case, Network
from conftest import (
    DEFINITIONS,
    EXACT,
    FEATURES,
    KERNELS,
    LOSSES,
    SAMPLED,
    Agree,
    Pass,
    as_list,
    comparable,
    is_sampled,
)
from networks import MOVED, NETWORKS
from satchel import backpack, extend, extensions
from satchel.layers import linear
from satchel.registry import REGISTRY
from satchel.runtime import averaged, cost, curvature, quantities, residual, sweep, uses
from satchel.runtime.cost import forced

MEAN_SQUARE = Case(next(n for n in NETWORKS if n.name == "sequence"), nn.MSELoss, "mean")


def expected(case: Case, feature: type, **options: Any) -> dict[str, Any]:
    reference = case.reference()
    return {name: reference.field(feature.__name__, name, **options) for name in reference.parameters}


def by_name(*names: str) -> Any:
    return pytest.mark.parametrize("network", [n for n in (*NETWORKS, *MOVED) if n.name in names], ids=lambda n: n.name)


# --- agreement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", EXACT)
def test_field(network: Network, loss: Any, reduction: str, feature: Any, agree: Agree) -> None:
    """Alone in its pass; other precisions and backends see all features together."""
    case = Case(network, loss, reduction)
    agree(Pass(case, torch.float64, "aten", feature()).fields(feature), expected(case, feature))


def check_together(case: Case, dtype: torch.dtype, backend: str, agree: Agree) -> None:
    done = Pass(case, dtype, backend, *(feature() for feature in EXACT))
    for feature in EXACT:
        agree(done.fields(feature), expected(case, feature))


def test_fields_together(network: Network, loss: Any, reduction: str, dtype: torch.dtype, agree: Agree) -> None:
    """All in one pass, where they share what they need."""
    check_together(Case(network, loss, reduction), dtype, "aten", agree)


@pytest.mark.parametrize("backend", KERNELS)
def test_fields_on_kernels(network: Network, loss: Any, dtype: torch.dtype, backend: str, agree: Agree) -> None:
    check_together(Case(network, loss, "mean"), dtype, backend, agree)


@pytest.mark.parametrize("mc_samples", [1, 3])
def test_sampled_fields(
    network: Network, loss: Any, reduction: str, dtype: torch.dtype, mc_samples: int, agree: Agree
) -> None:
    """What was drawn is read off a probe at the output (see ``Revealed``): given that, the fields are exact."""
    case = Case(network, loss, reduction)
    done = Pass(case, dtype, "aten", *(feature(mc_samples=mc_samples) for feature in SAMPLED), reveal=True)
    drawn = done.model.curvature(done.model.probe.weight.diag_ggn_mc)
    for feature in SAMPLED:
        agree(done.fields(feature), expected(case, feature, curvature=drawn))


@by_name("relu", "long_sequence", "siamese", "attention", "inplace_sequence")
def test_sampled_fields_on_backends(
    network: Network, loss: Any, dtype: torch.dtype, backend: str, agree: Agree
) -> None:
    case = Case(network, loss, "mean")
    done = Pass(case, dtype, backend, *(feature() for feature in SAMPLED), reveal=True)
    drawn = done.model.curvature(done.model.probe.weight.diag_ggn_mc)
    for feature in SAMPLED:
        agree(done.fields(feature), expected(case, feature, curvature=drawn))


@by_name("relu", "sequence", "siamese", "branches")
@pytest.mark.parametrize("feature", EXACT)
def test_field_on_backends(
    network: Network, loss: Any, dtype: torch.dtype, backend: str, feature: Any, agree: Agree
) -> None:
    case = Case(network, loss, "sum")
    agree(Pass(case, dtype, backend, feature()).fields(feature), expected(case, feature))


def test_gradient_is_untouched(network: Network, loss: Any, reduction: str, agree: Agree) -> None:
    case = Case(network, loss, reduction)
    done = Pass(case, torch.float64, "aten", *(feature() for feature in FEATURES))
    agree(done.gradients(), {name: g.sum(0) for name, g in case.reference().gradients.items()})


@by_name("frozen_first", "frozen_middle", "frozen_last", "frozen_some")
def test_frozen_parameters_have_no_fields(network: Network, feature: Any) -> None:
    done = Pass(Case(network, nn.MSELoss, "mean"), torch.float64, "aten", feature())
    for p in done.network.parameters():
        assert hasattr(p, feature.field) == p.requires_grad


# --- options -----------------------------------------------------------------------------------------------------


@by_name("relu", "bias_free", "one_sample", "sequence", "siamese", "skip")
@pytest.mark.parametrize("feature", EXACT)
def test_table5(network: Network, loss: Any, reduction: str, feature: Any, agree: Agree) -> None:
    case = Case(network, loss, reduction)
    done = Pass(case, torch.float64, "aten", feature(scaling="table5"))
    agree(done.fields(feature), expected(case, feature, scaling="table5"))


@by_name("relu", "sequence")
def test_table5_sampled(network: Network, loss: Any, reduction: str, agree: Agree) -> None:
    case = Case(network, loss, reduction)
    done = Pass(case, torch.float64, "aten", *(feature(scaling="table5") for feature in SAMPLED), reveal=True)
    drawn = done.model.curvature(done.model.probe.weight.diag_ggn_mc) * case.network.shape[0] / case.unit()
    for feature in SAMPLED:
        agree(done.fields(feature), expected(case, feature, scaling="table5", curvature=drawn))


@by_name(
    "relu", "sequence", "grid", "siamese", "siamese_distant", "recurrent", "tied_parallel", "broadcast", "one_position"
)
@pytest.mark.parametrize("approximation", ["backpack", "expand", "reduce"])
def test_approximation(network: Network, loss: Any, approximation: str, agree: Agree) -> None:
    case = Case(network, loss, "mean")
    done = Pass(case, torch.float64, "aten", extensions.KFLR(approximation=approximation))
    agree(done.fields(extensions.KFLR), expected(case, extensions.KFLR, approximation=approximation))
    sampled = Pass(
        case, torch.float64, "aten", extensions.KFAC(approximation=approximation), extensions.DiagGGNMC(), reveal=True
    )
    drawn = sampled.model.curvature(sampled.model.probe.weight.diag_ggn_mc)
    wanted = expected(case, extensions.KFAC, approximation=approximation, curvature=drawn)
    agree(sampled.fields(extensions.KFAC), wanted)


SUBSAMPLED = [feature for feature in FEATURES if "subsampling" in inspect.signature(feature).parameters]
WHOLE = [extensions.SumGradSquared(), extensions.BatchDiagGGNExact(), extensions.DiagGGNMC()]


@by_name("relu", "sequence", "siamese", "tied_sequential", "rows", "positions_first")
@pytest.mark.parametrize("subsampling", [[0], [3, -4], [2, 2], [], [4, 3, 2, 1, 0]])
def test_subsampling(network: Network, subsampling: list[int], dtype: torch.dtype, backend: str, agree: Agree) -> None:
    """Only the listed samples, in that order, still scaled by the whole batch; features of all samples are not affected."""
    case = Case(network, nn.CrossEntropyLoss, "mean")
    features = [*(feature(subsampling=subsampling) for feature in SUBSAMPLED), *WHOLE]
    done = Pass(case, dtype, backend, *features, reveal=True)
    drawn = done.model.curvature(done.model.probe.weight.diag_ggn_mc)
    for feature in features:
        options = {"curvature": drawn} if is_sampled(type(feature)) else {}
        options |= {"subsampling": subsampling} if feature.subsampling is not None else {}
        agree(done.fields(feature), expected(case, type(feature), **options))


def test_subsampling_takes_the_samples_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed for the samples that are not asked for."""
    seen = []
    original = quantities.evaluate

    def spy(rule: Any, layer: Any, operand: Any, *arguments: Any, **options: Any) -> Any:
        seen.append([argument.shape[1] for argument in arguments])
        return original(rule, layer, operand, *arguments, **options)

    monkeypatch.setattr(quantities, "evaluate", spy)
    Pass(MEAN_SQUARE, torch.float64, "aten", *(feature(subsampling=[3, 1]) for feature in SUBSAMPLED))
    assert len(seen) == 4 * len(SUBSAMPLED) and all(samples == [2] for samples in seen)


def test_columns_of_a_square_root(loss: Any, reduction: str) -> None:
    """BackPACK's: √(2c) per output of a squared error; √(c p_v) (δ_vk − p_k) per class of a classification."""
    case = Case(next(n for n in NETWORKS if n.name == "linear"), loss, reduction)
    done = Pass(case, torch.float64, "aten", extensions.SqrtGGNExact())
    f = case.reference().outputs[0].detach()
    terms = f.numel() if issubclass(loss, nn.MSELoss) else len(f)
    scale = 1 / terms if reduction == "mean" else 1.0
    p = f.softmax(1)
    eye = torch.eye(3, dtype=torch.float64)
    columns = (
        2**0.5 * eye[:, None].expand(3, 5, 3)
        if issubclass(loss, nn.MSELoss)
        else p.T.sqrt()[..., None] * (eye[:, None] - p)
    )
    torch.testing.assert_close(done.network.bias.sqrt_ggn_exact, columns * scale**0.5)


def test_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch, loss: Any) -> None:
    """All features in one pass: no rule of a layer or loss sees the same tensors twice."""
    calls: list[tuple[Any, ...]] = []
    for module in (uses, quantities, sweep, curvature, residual, averaged):
        original = module.evaluate

        def spy(rule: Any, layer: Any, operand: Any, *arguments: Any, original: Any = original, **options: Any) -> Any:
            operands = [operand(name) for name in rule.operands]
            calls.append((rule, *(a if isinstance(a, torch.Tensor) else None for a in (*arguments, *operands))))
            return original(rule, layer, operand, *arguments, **options)

        monkeypatch.setattr(module, "evaluate", spy)
    case = Case(next(n for n in NETWORKS if n.name == "sigmoid_tanh"), loss, "mean")
    Pass(case, torch.float64, "aten", *(feature() for feature in FEATURES))
    assert len(calls) > 50
    for one, other in itertools.combinations(calls, 2):
        same = one[0] is other[0] and all(
            a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))
            for a, b in zip(one[1:], other[1:], strict=True)
        )
        assert not same, one[0]


@by_name("relu", "sequence", "long_sequence", "grid", "siamese", "flatten")
@pytest.mark.parametrize("program", ["separated", "gram", "blockwise"])
def test_every_program(network: Network, loss: Any, dtype: torch.dtype, program: str, agree: Agree) -> None:
    """The choice by cost changes no value: each program in turn, wherever it is valid."""
    case = Case(network, loss, "mean")
    with forced(program):
        for feature in EXACT:
            agree(Pass(case, dtype, "aten", feature()).fields(feature), expected(case, feature))


# --- what must hold without a reference ---------------------------------------------------------------------------


@by_name("sequence", "skip", "nested", "broadcast", "siamese_distant", "recurrent", "tied_in_a_row", "attention")
def test_kfra_of_one_sample_is_exact(network: Network, loss: Any, agree: Agree) -> None:
    """The average over one sample is no approximation: KFRA is KFLR with positions summed."""
    one = Network("one", network.build, (1, *network.shape[1:]))
    kfra, kflr = extensions.KFRA(), extensions.KFLR(approximation="backpack")
    done = Pass(Case(one, loss, "sum"), torch.float64, "aten", kfra, kflr)
    agree(done.fields(kfra), done.fields(kflr))


@by_name("sigmoid_tanh", "sequence", "double_skip", "recurrent")
def test_moments_are_those_of_the_individual_gradients(network: Network) -> None:
    features = [extensions.BatchL2Grad(), extensions.BatchGrad(), extensions.Variance(), extensions.SumGradSquared()]
    done = Pass(Case(network, nn.MSELoss, "mean"), torch.float64, "aten", *features)
    for p in done.network.parameters():
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)
        torch.testing.assert_close(p.batch_l2, p.grad_batch.flatten(1).square().sum(1))
        torch.testing.assert_close(p.sum_grad_squared, p.grad_batch.square().sum(0))
        torch.testing.assert_close(p.variance, p.grad_batch.var(0, correction=0))


@pytest.mark.parametrize("positions", [1, 7])
@pytest.mark.parametrize("ratio", [1.0, 1e3])
def test_variance_does_not_cancel(positions: int, ratio: float, agree: Agree) -> None:
    """Gradients of mean `ratio` and deviation 1 in float32: each program, against float64 on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    factor, x = (
        (ratio + torch.randn(shape, generator=generator)) for shape in ((1, 64, positions, 6), (64, positions, 5))
    )
    individual = factor[0].double().transpose(-2, -1) @ x.double()
    wanted = {"variance": individual.var(0, correction=0)}
    for program in ["centred", "blockwise"][positions > 1 :]:
        with forced(program):
            found = linear.weight_squared_deviations(factor, x) / 64
        # A product of ratio² is rounded to 6e-8 of itself before its mean is taken off; operands are centred before they meet.
        rounding = 1e-5 if program == "centred" else 1e-6 * ratio
        agree({"variance": found}, wanted, tolerance=max(rounding, 1e-5))


@pytest.mark.parametrize("outlier", [0.0, 1e2, 1e6])
def test_variance_in_blocks_when_the_first_is_far_off(outlier: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean that begins far from the others costs no digits."""
    monkeypatch.setattr(cost, "machine", cost.Machine(cache_elements=1))  # a sample for a block
    generator = torch.Generator().manual_seed(0)
    factor, x = (torch.randn(shape, generator=generator) for shape in ((1, 64, 7, 6), (64, 7, 5)))
    factor[:, 0] += outlier
    individual = factor[0].double().transpose(-2, -1) @ x.double()
    with forced("blockwise"):
        found = linear.weight_squared_deviations(factor, x) / 64
    torch.testing.assert_close(found.double(), individual.var(0, correction=0), rtol=1e-5, atol=0)


def test_variance_of_equal_gradients_is_zero_and_never_negative() -> None:
    model, loss = extend(nn.Linear(4, 3)), extend(nn.MSELoss(reduction="sum"))
    x, y = torch.randn(1, 4).expand(6, 4), torch.randn(1, 3).expand(6, 3)
    with backpack(extensions.Variance()):
        loss(model(x), y).backward()
    assert all(
        (p.variance >= 0).all() and p.variance.max() <= 1e-12 * p.grad.square().max() for p in model.parameters()
    )
    x = torch.randn(40, 4).relu() * (torch.rand(40, 4) < 0.2)
    with backpack(extensions.Variance()):
        loss(model(x), torch.randn(40, 3)).backward()
    assert all((p.variance >= 0).all() for p in model.parameters())


def test_every_definition_is_emitted_and_tested() -> None:
    assert {layer.name for layer in REGISTRY.layers} == {d.name for d in DEFINITIONS.layers}
    assert {loss.name for loss in REGISTRY.losses} == {d.name for d in DEFINITIONS.losses}
    assert set(REGISTRY.extensions) == set(FEATURES)
    assert {loss.module for loss in REGISTRY.losses} >= set(LOSSES)  # all of them: test_losses


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 5),
    extra=st.lists(st.integers(1, 3), max_size=2),
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    activations=st.lists(st.sampled_from([nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Identity]), min_size=3, max_size=3),
    bias=st.booleans(),
    loss=st.sampled_from(LOSSES),
    reduction=st.sampled_from(["mean", "sum"]),
    feature=st.sampled_from(EXACT),
)
def test_shapes(
    agree: Agree,
    batch: int,
    extra: list[int],
    widths: list[int],
    activations: list[Any],
    bias: bool,
    loss: Any,
    reduction: str,
    feature: Any,
) -> None:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for k, (i, o) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Linear(i, o, bias=bias), activations[k]()]
        return nn.Sequential(*layers[:-1])

    assume(
        widths[-1] > 1 or loss is not nn.CrossEntropyLoss
    )  # of one class, autograd's second derivative is not a number
    case = Case(Network("drawn", build, (batch, *extra, widths[0])), loss, reduction)
    agree(Pass(case, torch.float64, "aten", feature()).fields(feature), expected(case, feature))


@by_name("relu", "sequence", "skip", "siamese")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("feature", EXACT)
def test_low_precision(
    network: Network, loss: Any, dtype: torch.dtype, backend: str, feature: Any, agree: Agree
) -> None:
    """Sums are accumulated in float32 or wider; what is left is the rounding of the network's own activations."""
    case = Case(Network("rounded", lambda: network.model().to(dtype).float(), network.shape), loss, "mean")
    done = Pass(case, dtype, backend, feature())
    wide = {p: widened(value) for p, value in done.fields(feature).items()}
    agree(wide, expected(case, feature), tolerance=0.1 if dtype is torch.bfloat16 else 0.02)


def widened(value: Any) -> Any:
    return [t.float() for t in value] if isinstance(value, list) else value.float()


@by_name("sigmoid_tanh", "strided_sequence")
@pytest.mark.parametrize("feature", EXACT)
def test_autocast(network: Network, feature: Any, agree: Agree) -> None:
    case = Case(network, nn.CrossEntropyLoss, "mean")
    model, loss = extend(network.model()), extend(case.criterion())
    with backpack(feature()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(case.arranged(model(network.input())), case.target())
        value.backward()
    fields = {name: getattr(p, feature.field) for name, p in model.named_parameters()}
    assert all(t.dtype == torch.float32 for value in fields.values() for t in as_list(value))
    fields = {name: comparable(feature, value) for name, value in fields.items()}
    agree(fields, expected(case, feature), tolerance=0.1)


def test_dtype_and_ownership_of_fields(feature: Any, dtype: torch.dtype) -> None:
    """Fields have their parameter's precision, share no memory with anything, and carry no graph."""
    case = MEAN_SQUARE
    done = Pass(case, dtype, "aten", feature())
    seen: set[int] = {p.data_ptr() for p in done.model.parameters()} | {
        p.grad.data_ptr() for p in done.model.parameters()
    }
    for parameter in done.network.parameters():
        value = getattr(parameter, feature.field)
        for tensor in value if isinstance(value, list) else [value]:
            assert tensor.dtype == dtype and not tensor.requires_grad and tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert tensor.data_ptr() not in seen
            seen.add(tensor.data_ptr())


def test_extend_twice_is_extend_once(feature: Any) -> None:
    case = MEAN_SQUARE
    model = extend(extend(case.network.model()))
    loss = extend(extend(case.criterion()))
    counts: list[nn.Module] = []
    with backpack(feature(), extension_hook=counts.append):
        loss(model(case.network.input()), case.target()).backward()
    assert len(counts) == len({id(m) for m in counts})
