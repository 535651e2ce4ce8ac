"""Squared deviations as a difference of two moments: only where that costs no digits, and with nothing but the use's own sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from satchel import backpack, extend, extensions
from satchel.runtime import moments
from satchel.runtime.cost import forced
from satchel.runtime.torch_private import has_exact_products

N = 64
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 6), (5,)),
    "without_bias": (lambda: nn.Linear(5, 6, bias=False), (5,)),
    "positions": (lambda: nn.Linear(5, 6), (7, 5)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 6)),
}


class Tried:
    """What `moments.difference` was asked for: whether it gave a value."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.served: list[bool] = []
        difference = moments.difference

        def noted(*arguments: Any, **options: Any) -> Tensor | None:
            value = difference(*arguments, **options)
            self.served.append(value is not None)
            return value

        monkeypatch.setattr(moments, "difference", noted)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Tried:
    return Tried(monkeypatch)


def layer(
    kind: str, samples: int = N, mean: float = 0.0, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, its input, and δ at its output: `mean` plus deviations of 1."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    module, x = make(), mean + torch.randn(samples, *shape)
    outputs = module(x).shape
    return module.to(dtype), x.to(dtype), (mean + torch.randn(outputs)).to(dtype)


def variances(module: nn.Module, x: Tensor, delta: Tensor, *others: Any) -> list[Tensor]:
    with backpack(extensions.Variance(), *others):
        (extend(module)(x) * delta).sum().backward()
    return [parameter.variance for parameter in module.parameters()]


def second_moments(module: nn.Module, x: Tensor, delta: Tensor, *others: Any) -> list[Tensor]:
    with backpack(extensions.SumGradSquared(), *others):
        (extend(module)(x) * delta).sum().backward()
    return [parameter.sum_grad_squared for parameter in module.parameters()]


def reference(module: nn.Module, x: Tensor, delta: Tensor) -> list[Tensor]:
    """Of the same numbers in float64."""
    double = {name: parameter.detach().double() for name, parameter in module.named_parameters()}

    def value(parameters: dict[str, Tensor], x: Tensor, delta: Tensor) -> Tensor:
        return (torch.func.functional_call(module, parameters, (x[None],))[0] * delta).sum()

    individual = torch.func.vmap(torch.func.grad(value), (None, 0, 0))(double, x.double(), delta.double())
    return [individual[name].var(0, correction=0) for name in double]


def assert_accurate(found: Sequence[Any], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    """Element by element."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=0)


@pytest.mark.parametrize("mean", [0.0, 0.5, 2.0, 10.0, 1e3])
@pytest.mark.parametrize("kind", LAYERS)
def test_accurate_whatever_the_mean(kind: str, mean: float, tried: Tried) -> None:
    module, x, delta = layer(kind, mean=mean)
    found, wanted = variances(module, x, delta), reference(module, x, delta)
    # What is left of gradients that are rounded before their mean is taken off: of a sum over positions, and of the bias.
    ratio = max(mean, 1.0) * (mean if kind in ("positions", "convolution") else 1)
    assert_accurate(found, wanted, max(1e-5, 3e-7 * ratio))
    if mean in (0.0, 1e3):
        assert any(tried.served) == (mean == 0) and tried.served


@pytest.mark.parametrize("kind", LAYERS)
def test_one_element_is_enough_to_refuse(kind: str, tried: Tried) -> None:
    module, x, delta = layer(kind)
    where = (slice(None), 2) if kind == "convolution" else (..., 2)
    x[where], delta[where] = 0.1, 1 + 1e-3 * torch.randn(delta[where].shape)
    # 1000 standard deviations: what is left of gradients that are rounded before their mean is taken off.
    assert_accurate(variances(module, x, delta)[:1], reference(module, x, delta)[:1], 1e-3)
    assert tried.served and not any(tried.served)


@pytest.mark.parametrize("part", [0.9, 1.1])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_worst_that_passes(kind: str, part: float, tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just before and behind the bound: as accurate as promised on both sides."""
    module, x, delta = layer(kind, mean=1.3)
    wanted = reference(module, x, delta)
    with forced("blockwise"):
        variances(module, x, delta, extensions.SumGradSquared())
    worst = (N * wanted[0] / module.weight.sum_grad_squared.double()).min().item()
    monkeypatch.setattr(moments, "LEAST", worst * part)
    assert_accurate(variances(module, x, delta)[:1], wanted[:1])
    assert any(tried.served) == (part < 1) and tried.served


def test_equal_gradients_have_no_variance_and_zeros_pass(tried: Tried) -> None:
    module, x, delta = layer("linear")
    (weight, _) = variances(module, x[:1].expand_as(x), delta[:1].expand_as(delta))
    assert (weight >= 0).all() and weight.max() <= 1e-10 and not any(tried.served)
    tried.served.clear()
    x[:, 2], delta[:, 3] = 0, 0
    assert_accurate(variances(module, x, delta), reference(module, x, delta))
    assert tried.served == [True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kind", LAYERS)
def test_not_finite(kind: str, bad: float, tried: Tried) -> None:
    module, x, delta = layer(kind)
    delta[3] = bad
    found = variances(module, x, delta)[0]
    assert tried.served and not any(tried.served) and not found.isfinite().any()
    if bad != bad:
        assert found.isnan().all()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_second_moment_that_is_asked_for_is_left(kind: str, tried: Tried) -> None:
    module, x, delta = layer(kind)
    alone = [second.clone() for second in second_moments(module, x, delta)]
    beside = second_moments(module, x, delta, extensions.Variance())
    assert any(tried.served)
    torch.testing.assert_close(beside, alone)


@pytest.mark.parametrize("samples", [1, moments.FEWEST - 1, moments.FEWEST])
@pytest.mark.parametrize("kind", LAYERS)
def test_of_few_samples_it_is_not_tried(kind: str, samples: int, tried: Tried) -> None:
    module, x, delta = layer(kind, samples)
    assert_accurate(variances(module, x, delta), reference(module, x, delta), 2e-5)
    assert len(tried.served) == (samples == moments.FEWEST)


def test_empty_batch(tried: Tried) -> None:
    module, x, delta = layer("linear", 0)
    assert all(variance.isnan().all() for variance in variances(module, x, delta)) and not tried.served


def test_a_program_that_is_forced_runs(tried: Tried) -> None:
    for program in ("centred", "blockwise"):
        with forced(program):
            module, x, delta = layer("linear")
            assert_accurate(variances(module, x, delta), reference(module, x, delta))
    assert not tried.served


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["linear", "without_bias"])
def test_no_product_beyond_the_second_moment(kind: str, tried: Tried) -> None:
    """Σ g is autograd's, Σ g² that of SumGradSquared, where that is asked for, too."""
    counts = {}
    for features in (
        (),
        (extensions.SumGradSquared,),
        (extensions.Variance,),
        (extensions.Variance, extensions.SumGradSquared),
    ):
        module, x, delta = nn.Linear(200, 100, kind == "linear").double(), *torch.randn(2, N, 200).double()
        extend(module)
        with Products() as products, backpack(*(feature() for feature in features)):
            (module(x) * delta[:, :100]).sum().backward()
        counts[len(features), extensions.Variance in features] = products.count
    assert counts[1, True] == counts[1, False] == counts[2, True] == counts[0, False] + 1
    assert tried.served == [True, True]


def _penalty(module: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    return (module(x) * delta).sum() + (module.weight * 0.1).sum()


def _hook(module: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    module.weight.register_hook(lambda gradient: gradient / 2)
    return (module(x) * delta).sum()


def _in_place(module: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    def halve(gradient: Tensor) -> None:
        gradient.div_(2)

    module.weight.register_hook(halve)
    return (module(x) * delta).sum()


def _twice(module: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    return (module(x) * delta).sum() + (module(x) * delta).sum()


@pytest.mark.parametrize("value,scale", [(_penalty, 1), (_hook, 1), (_in_place, 1), (_twice, 4)])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_sum_is_that_of_the_use(kind: str, value: Callable[..., Tensor], scale: int) -> None:
    """Penalties, hooks and other uses reach the parameter's gradient, not the moments."""
    module, x, delta = layer(kind)
    wanted = reference(module, x, delta)
    with backpack(extensions.Variance()):
        value(extend(module), x, delta).backward()
    assert_accurate([module.weight.variance], [scale * wanted[0]])


def test_a_gradient_without_accumulation(tried: Tried) -> None:
    module, x, delta = layer("linear")
    extend(module)
    with backpack(extensions.Variance()):
        (gradient,) = torch.autograd.grad((module(x) * delta).sum(), [module.weight])
    assert_accurate([module.weight.variance], reference(module, x, delta)[:1])
    torch.testing.assert_close(gradient, delta.T @ x)
    assert tried.served == [True]


@pytest.mark.parametrize("kind", LAYERS)
def test_differentiated_fields_take_no_moments(kind: str, tried: Tried) -> None:
    module, x, delta = layer(kind)
    delta.requires_grad_()
    with backpack(extensions.Variance()):
        (extend(module)(x) * delta).sum().backward(create_graph=True)
    assert module.weight.variance.requires_grad and not tried.served
    assert_accurate([module.weight.variance.detach()], reference(module, x, delta.detach())[:1])


@pytest.mark.parametrize("kind", LAYERS)
def test_half_precision(kind: str) -> None:
    module, x, delta = layer(kind, dtype=torch.bfloat16)
    (found, *_) = variances(module, x, delta)
    assert found.dtype == torch.float32
    assert_accurate([found], reference(module, x, delta)[:1])


def test_narrower_products_are_told() -> None:
    assert has_exact_products()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert not has_exact_products()
    finally:
        torch.set_float32_matmul_precision(before)
    assert has_exact_products()
