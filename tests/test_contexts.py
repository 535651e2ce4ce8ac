"""Contexts, and the hook that runs in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Wired
from conftest import FEATURES
from lifetimes import Watch, extended, x, y
from satchel import backpack, disable, extend
from satchel.extensions import KFAC, KFLR, BatchGrad, BatchL2Grad, DiagGGNExact, Variance

# --- contexts ---------------------------------------------------------------------------------------------------------


def test_nested_contexts() -> None:
    """The inner one is in force inside, the outer one again afterwards."""
    model, loss_fn = extended()
    with backpack(BatchGrad()):
        with backpack(Variance()):
            loss_fn(model(x), y).backward()
            assert all(hasattr(p, "variance") for p in model.parameters())
        for p in model.parameters():
            del p.variance
        loss_fn(model(x), y).backward()
        assert all(hasattr(p, "grad_batch") and not hasattr(p, "variance") for p in model.parameters())


def test_context_ends_with_an_exception() -> None:
    model, loss_fn = extended()
    with pytest.raises(KeyError), backpack(BatchGrad()):
        raise KeyError
    loss_fn(model(x), y).backward()
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())


def test_a_context_may_be_used_again() -> None:
    model, loss_fn = extended()
    context = backpack(BatchGrad())
    for _ in range(2):
        with context:
            loss_fn(model(x), y).backward()
        assert all(hasattr(p, "grad_batch") for p in model.parameters())
        for p in model.parameters():
            del p.grad_batch


def test_empty_context() -> None:
    model, loss_fn = extended()
    seen: list[nn.Module] = []
    with backpack(extension_hook=seen.append):
        loss_fn(model(x), y).backward()
    assert seen


def test_many_backwards_in_a_context() -> None:
    model, loss_fn = extended()
    with backpack(BatchGrad()):
        for size in (5, 2, 3):
            loss_fn(model(x[:size]), y[:size]).backward()
            assert all(len(p.grad_batch) == size for p in model.parameters())


def test_disabled_part() -> None:
    """Whatever runs under `disable` is not recorded, so its parameters are missed by name, not in silence."""
    model, loss_fn = extended()
    with disable():
        h = model[:2](x)
    loss = loss_fn(model[2:](h), y)
    loss.backward(retain_graph=True)
    with backpack(BatchGrad()):
        loss_fn(model(x), y).backward()
    assert all(hasattr(p, "grad_batch") for p in model.parameters())


# --- extension_hook ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [(BatchGrad,), (KFLR,), (BatchGrad, KFAC, DiagGGNExact)])
def test_extension_hook_order(features: tuple[Any, ...]) -> None:
    """Once for each leaf module, the loss first, in backward order; the module's fields are set by then."""
    model, loss_fn = extended()
    seen: list[nn.Module] = []

    def hook(module: Any) -> None:
        seen.append(module)
        for p in module.parameters():
            assert all(hasattr(p, feature.field) for feature in features)

    with backpack(*(feature() for feature in features), extension_hook=hook):
        loss_fn(model(x), y).backward()
    assert seen == [loss_fn, *reversed(model)]


def test_extension_hook_runs_for_modules_without_a_node() -> None:
    model: Any = extend(nn.Sequential(nn.Linear(4, 3), nn.Identity(), nn.Flatten()))
    loss_fn = extend(nn.CrossEntropyLoss())
    seen: list[nn.Module] = []
    with backpack(BatchGrad(), extension_hook=seen.append):
        loss_fn(model(x), y).backward()
    assert set(seen) == {loss_fn, *model} and len(seen) == 4 and seen[0] is loss_fn and seen[-1] is model[0]


def test_extension_hook_runs_once_for_a_module_called_twice() -> None:
    model: Any = extend(Wired(lambda m, x: m.a(m.act(m.a(x))), a=nn.Linear(4, 4), act=nn.Tanh()))
    loss_fn = extend(nn.CrossEntropyLoss())
    seen: list[nn.Module] = []

    def hook(module: Any) -> None:
        seen.append(module)
        if module is model.a:
            torch.testing.assert_close(module.weight.grad_batch, module.weight.grad_batch)

    with backpack(BatchGrad(), extension_hook=hook):
        loss_fn(model(x), y).backward()
    assert sorted(map(id, seen)) == sorted(map(id, [loss_fn, model.act, model.a])), "each once"
    assert seen[0] is loss_fn
    torch.testing.assert_close(model.a.weight.grad_batch.sum(0), model.a.weight.grad)


def test_extension_hook_may_reduce_fields() -> None:
    """The common use: keep a statistic, delete the field while memory is tight."""
    model, loss_fn = extended()
    norms: dict[nn.Module, Tensor] = {}

    def hook(module: Any) -> None:
        for p in module.parameters():
            norms[module] = norms.get(module, torch.zeros(5)) + p.grad_batch.flatten(1).square().sum(1)
            del p.grad_batch

    with backpack(BatchGrad(), BatchL2Grad(), extension_hook=hook):
        loss_fn(model(x), y).backward()
    for module in (model[0], model[2], model[4]):
        torch.testing.assert_close(norms[module], sum(p.batch_l2 for p in module.parameters()))
        assert not any(hasattr(p, "grad_batch") for p in module.parameters())


@pytest.mark.parametrize("feature", FEATURES)
def test_exception_in_the_hook_cleans_up(feature: Any, no_gc: None) -> None:
    model, loss_fn = extended()

    def hook(module: Any) -> None:
        if module is model[2]:
            raise KeyError("from the hook")

    loss = loss_fn(model(x), y)
    with pytest.raises(KeyError, match="from the hook"), backpack(feature(), extension_hook=hook):
        loss.backward()
    del loss
    loss_fn(model(x), y).backward()  # plain
    watch = Watch(model)
    loss = loss_fn(model(x), y)
    with backpack(feature()):
        loss.backward()
    assert all(hasattr(p, feature.field) for p in model.parameters())
    del loss
    assert watch.alive() == 0


def test_exception_in_another_node_cleans_up() -> None:
    """queue_callback does not run if a node raises."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return h.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise KeyError("in backward")

    model, loss_fn = extended()
    for _ in range(2):
        with pytest.raises(Exception, match="in backward"), backpack(BatchGrad()):
            loss_fn(model[2:](Fails.apply(model[:2](x))), y).backward()
        assert not any(hasattr(p, "grad_batch") for p in model[0].parameters())
        with backpack(BatchGrad()):
            loss_fn(model(x), y).backward()
        assert all(p.grad_batch.shape[0] == 5 for p in model.parameters())
        del model[0].weight.grad_batch, model[0].bias.grad_batch
