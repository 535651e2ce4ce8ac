"""Where individual gradients of a kernel are computed, autograd does not compute their sum again, and nobody can tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import FEATURES
from satchel import backpack, extend, extensions
from satchel.runtime.errors import Overwritten

N = 3
CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2),
    "2d": lambda: nn.Conv2d(2, 3, (2, 3), padding=1, dilation=(2, 1)),
    "3d": lambda: nn.Conv3d(2, 3, 2, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, (3, 2), stride=2, padding=1, output_padding=1),
}
SHAPES = {"1d": (4, 9), "2d": (2, 5, 6), "3d": (2, 3, 4, 3), "transposed": (2, 3, 4)}
OVER_SAMPLES = [
    extensions.BatchGrad, extensions.BatchL2Grad, extensions.SumGradSquared, extensions.Variance,
]  # fmt: skip


class Products(TorchDispatchMode):
    """Counts what autograd asks of convolutions of the whole batch: gradients of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten.convolution_backward.default:
            if type(args[0]) is not Tensor:
                with self:  # and see what that calls
                    return type(args[0]).__torch_dispatch__(function, types, args, kwargs)
            self.kernels += len(args[1]) == N and args[-1][1]
        return function(*args, **(kwargs or {}))


def network(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(CONVOLUTIONS[kind](), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    x = torch.randn(N, *SHAPES[kind], dtype=torch.float64, requires_grad=True)
    model(x)  # lazy
    return model, x


def value(model: nn.Module, x: Tensor) -> Tensor:
    return extend(nn.CrossEntropyLoss())(model(x), torch.arange(N) % 3)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """By autograd alone."""
    return list(
        torch.autograd.grad(nn.functional.cross_entropy(model(x), torch.arange(N) % 3), list(model.parameters()))
    )


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("feature", FEATURES)
def test_what_autograd_computes(kind: str, feature: Any) -> None:
    model, x = network(kind)
    want = gradients(model, x)
    loss = value(extend(model), x)
    with Products() as products, backpack(feature()):
        loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], want)
    if feature is not extensions.BatchL2Grad:  # which may be had without the individual gradients
        assert products.kernels == (feature not in OVER_SAMPLES)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("feature", OVER_SAMPLES)
def test_hooks_see_the_gradient(kind: str, feature: Any) -> None:
    model, x = network(kind)
    kernel, want = model[0].weight, gradients(model, x)
    seen: list[Tensor] = []
    around: list[Tensor] = []
    kernel.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    kernel.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))
    model[0].register_full_backward_hook(lambda module, *gradients: around.extend(sum(gradients, ())))
    with backpack(feature()):
        value(extend(model), x).backward()
    assert len(around) == 2 and all(type(tensor) is Tensor for tensor in (*seen, *around))
    torch.testing.assert_close(seen, [want[0], 2 * want[0]])
    torch.testing.assert_close(kernel.grad, 2 * want[0])


@pytest.mark.parametrize("feature", OVER_SAMPLES)
def test_gradients_add_up_over_backwards(feature: Any) -> None:
    model, x = network("2d")
    want = gradients(model, x)
    loss = value(extend(model), x)
    with backpack(feature()):
        loss.backward(retain_graph=True)
        first = getattr(model[0].weight, feature.field).clone()
        loss.backward()
    torch.testing.assert_close(model[0].weight.grad, 2 * want[0])
    torch.testing.assert_close(getattr(model[0].weight, feature.field), first)


@pytest.mark.parametrize("feature", OVER_SAMPLES)
def test_gradients_that_are_returned_or_differentiated(feature: Any) -> None:
    model, x = network("2d")
    plain = list(model.parameters())
    loss = nn.functional.cross_entropy(model(x), torch.arange(N) % 3)
    want = torch.autograd.grad(loss, plain, create_graph=True)
    twice = torch.autograd.grad(sum(g.square().sum() for g in want), plain)
    extend(model)
    with backpack(feature()):
        torch.testing.assert_close(torch.autograd.grad(value(model, x), plain), want)
        found = torch.autograd.grad(value(model, x), plain, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(sum(g.square().sum() for g in found), plain), twice)


@pytest.mark.parametrize("feature", OVER_SAMPLES)
def test_what_changes_after_us_counts(feature: Any) -> None:
    """A hook of the node that comes after satchel's changes δ: autograd's own product takes that."""
    model, x = network("2d")
    want = gradients(model, x)
    extend(model)
    between: list[Any] = []
    model[0].register_forward_hook(lambda module, args, output: between.append(output.grad_fn))
    loss = value(model, x)
    between[0].register_prehook(lambda given: tuple(2 * delta for delta in given))
    with backpack(feature()):
        loss.backward()
    torch.testing.assert_close([p.grad for p in model[0].parameters()], [2 * g for g in want[:2]])


def test_a_kernel_of_two_calls() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv1d(2, 2, 3, padding=1).double()
    model = nn.Sequential(convolution, nn.Tanh(), convolution, nn.Flatten(), nn.Linear(8, 3).double())
    x = torch.randn(N, 2, 4, dtype=torch.float64)
    want = gradients(model, x)
    with backpack(extensions.BatchGrad()):
        value(extend(model), x).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], want)
    torch.testing.assert_close(convolution.weight.grad_batch.sum(0), want[0])


def test_some_samples_are_not_all() -> None:
    model, x = network("2d")
    want = gradients(model, x)
    with Products() as products, backpack(extensions.BatchGrad(subsampling=[1])):
        value(extend(model), x).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], want)
    assert products.kernels == 1


def test_half_precision_is_autograds_own() -> None:
    model, x = network("2d")
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), torch.arange(N) % 3)
    want = torch.autograd.grad(loss, list(model.parameters()))
    extend(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = value(model, x)
    with backpack(extensions.BatchGrad()):
        loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(want), rtol=0, atol=0)


def test_an_input_that_is_overwritten_once_its_gradients_are_known():
    """No walk knows of the second call, so that its gradients are computed again together with the first's."""
    layer = extend(nn.Conv2d(2, 3, 3))
    x, y = torch.randn(4, 2, 6, 6), torch.randn(4, 2, 6, 6)
    above = layer(x)
    loss = above.square().sum() + layer(y).exp().sum()
    above.register_hook(lambda _: (y.add_(1), None)[1])  # when the second call's node has run
    with pytest.raises(Overwritten, match="input"), backpack(extensions.BatchGrad()):
        loss.backward()
