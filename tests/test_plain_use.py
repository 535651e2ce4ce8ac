"""An extended model is otherwise a plain one, also in several backwards."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FEATURES
from lifetimes import extended, network, x, y
from satchel import backpack, extend
from satchel.extensions import KFLR, BatchGrad, DiagGGNExact

# --- an extended model is a plain one ---------------------------------------------------------------------------------


def test_no_grad_and_inference() -> None:
    model, plain = extend(network()), network()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x)) and not model(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))


def test_backward_outside_the_context_sets_nothing() -> None:
    model, loss_fn = extended()
    loss = loss_fn(model(x), y)
    with backpack(BatchGrad()):
        loss_fn(model(x), y).backward()
        for p in model.parameters():
            del p.grad_batch
    loss.backward()
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())


def test_forward_outside_the_context_is_enough() -> None:
    model, loss_fn = extended()
    loss = loss_fn(model(x), y)
    with backpack(BatchGrad(), DiagGGNExact()):
        loss.backward()
    assert all(hasattr(p, "grad_batch") and hasattr(p, "diag_ggn_exact") for p in model.parameters())


def test_double_backward_without_features() -> None:
    def penalty(model: nn.Module, loss_fn: nn.Module) -> list[Tensor]:
        slopes = torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()), create_graph=True)
        return list(
            torch.autograd.grad(torch.stack([s.square().sum() for s in slopes]).sum(), list(model.parameters()))
        )

    torch.testing.assert_close(penalty(*extended()), penalty(network(), nn.CrossEntropyLoss()))


def test_functorch_per_sample_gradients() -> None:
    """vmap(grad) over an extended model: the hooks step aside."""
    model, loss_fn = extended()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    individual = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    with backpack(BatchGrad()):
        loss_fn(model(x), y).backward()
        inside = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_batch * len(x), individual[name])
        torch.testing.assert_close(inside[name], individual[name])


def test_functorch_hessian_and_jvp() -> None:
    model, plain = extend(network()), network()
    direction = torch.ones_like(x)
    torch.testing.assert_close(torch.func.jvp(model, (x,), (direction,)), torch.func.jvp(plain, (x,), (direction,)))
    torch.testing.assert_close(
        torch.func.hessian(lambda x: model(x).sum())(x[0]), torch.func.hessian(lambda x: plain(x).sum())(x[0])
    )


def test_backward_in_another_thread() -> None:
    """The context is process-global: CUDA's backward runs in device threads."""
    model, loss_fn = extended()
    with backpack(BatchGrad(), DiagGGNExact()):
        loss = loss_fn(model(x), y)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert all(hasattr(p, "grad_batch") and hasattr(p, "diag_ggn_exact") for p in model.parameters())


# --- several backwards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
def test_second_backward(feature: Any) -> None:
    """retain_graph=True for autograd is enough; the fields are those of the first time."""
    model, loss_fn = extended()
    loss = loss_fn(model(x), y)
    fields = []
    for retain in (True, True, False):
        torch.manual_seed(0)
        with backpack(feature()):
            loss.backward(retain_graph=retain)
        fields.append([getattr(p, feature.field) for p in model.parameters()])
    torch.testing.assert_close(fields[0], fields[1], rtol=0, atol=0)
    torch.testing.assert_close(fields[0], fields[2], rtol=0, atol=0)


@pytest.mark.parametrize("feature", FEATURES)
def test_backward_of_a_freed_graph_is_an_error(feature: Any) -> None:
    model, loss_fn = extended()
    loss = loss_fn(model(x), y)
    with backpack(feature()):
        loss.backward()
    kept = [getattr(p, feature.field) for p in model.parameters()]
    with pytest.raises(RuntimeError, match="retain_graph"), backpack(feature()):
        loss.backward()
    assert all(getattr(p, feature.field) is k for p, k in zip(model.parameters(), kept, strict=True))


def test_backward_after_a_plain_backward() -> None:
    model, loss_fn = extended()
    loss = loss_fn(model(x), y)
    loss.backward(retain_graph=True)
    with backpack(BatchGrad(), KFLR()):
        loss.backward()
    assert all(hasattr(p, "grad_batch") and hasattr(p, "kflr") for p in model.parameters())


def test_shared_trunk_of_two_graphs() -> None:
    """Two losses with one forward; each pass sees its own."""
    model, loss_fn = extended()
    h = model[:3](x)
    first, second = loss_fn(model[3:](h), y), loss_fn(model[3:](0.5 * h), y)
    with backpack(BatchGrad(), DiagGGNExact()):
        first.backward(retain_graph=True)
        one = [p.grad_batch for p in model.parameters()]
        second.backward()
        two = [p.grad_batch for p in model.parameters()]
    summed = [a.sum(0) + b.sum(0) for a, b in zip(one, two, strict=True)]
    torch.testing.assert_close(summed, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("feature", FEATURES)
def test_autograd_grad(feature: Any) -> None:
    """autograd.grad does not reach the accumulation of gradients; fields are set all the same."""
    model, loss_fn = extended()
    torch.manual_seed(0)
    with backpack(feature()):
        slopes = torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))
    again, loss_fn = extended()
    torch.manual_seed(0)
    with backpack(feature()):
        loss_fn(again(x), y).backward()
    torch.testing.assert_close(list(slopes), [p.grad for p in again.parameters()])
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(getattr(p, feature.field), getattr(q, feature.field))
        assert p.grad is None


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("call", ["backward", "autograd.grad"])
def test_some_inputs(feature: Any, call: str) -> None:
    """Only the parameters that the backward computes get fields, right ones."""
    model, loss_fn = extended()
    wanted = [model[2].weight, model[4].bias]
    with backpack(feature()):
        loss = loss_fn(model(x), y)
        if call == "backward":
            loss.backward(inputs=wanted)
        else:
            torch.autograd.grad(loss, wanted)
    assert [hasattr(p, feature.field) for p in model.parameters()] == [
        any(p is w for w in wanted) for p in model.parameters()
    ]


def test_gradients_of_the_input_only() -> None:
    """A backward that computes no parameter leaves fields alone, without an error."""
    model, loss_fn = extended()
    inputs = x.clone().requires_grad_()
    with backpack(BatchGrad(), DiagGGNExact()):
        loss_fn(model(x), y).backward()
        kept = [p.grad_batch for p in model.parameters()]
        torch.autograd.grad(loss_fn(model(inputs), y), inputs)
    assert all(p.grad_batch is k for p, k in zip(model.parameters(), kept, strict=True))
