"""What lives how long, and that an extended model is otherwise a plain one."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FEATURES
from networks import Wired
from satchel import backpack, disable, extend
from satchel.extensions import KFAC, KFLR, BatchGrad, BatchL2Grad, DiagGGNExact, Variance

torch.manual_seed(0)
x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])


def network(inplace: bool = False) -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def extended() -> tuple[Any, Any]:
    return extend(network()), extend(nn.CrossEntropyLoss())


@pytest.fixture
def no_gc() -> Iterator[None]:
    """What dies in the test dies by reference counts."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Watch:
    """Weak references to the outputs of all modules, and to the batch."""

    def __init__(self, *modules: nn.Module) -> None:
        self.references: list[weakref.ref[Tensor]] = []
        for module in modules:
            for inner in module.modules():
                inner.register_forward_hook(lambda m, args, output: self.add(output))

    def add(self, tensor: Tensor) -> Tensor:
        self.references.append(weakref.ref(tensor))
        return None  # type: ignore[return-value]

    def alive(self) -> int:
        return sum(reference() is not None for reference in self.references)


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_lives_after_backward(feature: Any, inplace: bool, no_gc: None) -> None:
    model: Any = extend(network(inplace))
    loss_fn = extend(nn.CrossEntropyLoss())
    watch = Watch(model, loss_fn)
    batch = x.clone()
    watch.add(batch)
    loss = loss_fn(model(batch), y)
    with backpack(feature()):
        loss.backward()
    assert watch.references
    del loss, batch
    assert watch.alive() == 0


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("active", [False, True])
def test_nothing_lives_after_a_forward_without_backward(inplace: bool, active: bool, no_gc: None) -> None:
    model: Any = extend(network(inplace))
    loss_fn = extend(nn.CrossEntropyLoss())
    watch = Watch(model, loss_fn)
    if active:
        with backpack(BatchGrad(), KFLR()):
            loss_fn(model(x), y).backward()
            loss = loss_fn(model(x.clone()), y)
    else:
        loss = loss_fn(model(x.clone()), y)
    assert watch.alive() > 0
    del loss
    assert watch.alive() == 0


def test_activations_die_while_the_loss_lives(no_gc: None) -> None:
    """After a backward that frees the graph, autograd's saved tensors are gone, and so must be ours."""
    model, loss_fn = extended()
    watch = Watch(model)
    batch = x.clone()
    watch.add(batch)
    loss = loss_fn(model(batch), y)
    del batch
    with backpack(BatchGrad(), DiagGGNExact()):
        loss.backward()
    assert watch.alive() == 0
    assert loss.item() > 0


def tensors_alive() -> int:
    """Memories, not objects: a field is a view or a copy, as addresses fall."""
    alive = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.layout == torch.strided]
    return len({tensor.untyped_storage().data_ptr() for tensor in alive})


@pytest.mark.parametrize("feature", FEATURES)
def test_passes_do_not_accumulate(feature: Any, no_gc: None) -> None:
    model, loss_fn = extended()
    counts = []
    for _ in range(4):
        with backpack(feature()):
            loss_fn(model(x), y).backward()
        counts.append(tensors_alive())
    assert counts[3] <= counts[1]


def test_a_module_that_keeps_its_output_can_be_freed() -> None:
    """metadata of a node is invisible to the gc: what a record holds must not lead back to the node."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.linear(x)
            return self.kept

    model = extend(Keeping())
    model(x)
    reference = weakref.ref(model.linear)
    del model
    gc.collect()
    assert reference() is None


def test_model_and_parameters_can_be_freed(no_gc: None) -> None:
    model, loss_fn = extended()
    loss = loss_fn(model(x), y)
    with backpack(BatchGrad(), KFLR()):
        loss.backward()
    references = [weakref.ref(m) for m in model.modules()]
    del model
    del loss
    assert all(reference() is None for reference in references)


# --- copies ------------------------------------------------------------------------------------------------------


def has_fields_after_backward(model: nn.Module, loss_fn: nn.Module) -> bool:
    with backpack(BatchGrad(), DiagGGNExact()):
        loss_fn(model(x), y).backward()
    return all(hasattr(p, "grad_batch") and hasattr(p, "diag_ggn_exact") for p in model.parameters())


@pytest.mark.parametrize("forward", ["no forward", "forward", "backward"])
@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "torch.save"])
def test_copies(kind: str, forward: str) -> None:
    """A copy is extended, has its own fields, and leaves the original's alone."""
    model, loss_fn = extended()
    loss = loss_fn(model(x), y) if forward != "no forward" else None
    if forward == "backward":
        with backpack(BatchL2Grad()):
            loss.backward()  # type: ignore[union-attr]
    if kind == "deepcopy":
        copied, copied_loss = copy.deepcopy((model, loss_fn))
    elif kind == "pickle":
        copied, copied_loss = pickle.loads(pickle.dumps((model, loss_fn)))
    else:
        buffer = io.BytesIO()
        torch.save((model, loss_fn), buffer)
        buffer.seek(0)
        copied, copied_loss = torch.load(buffer, weights_only=False)
    assert has_fields_after_backward(copied, copied_loss)
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())
    assert has_fields_after_backward(model, loss_fn)
    with backpack(BatchGrad()):
        (copied_loss(copied(x), y)).backward()
        copied_fields = [p.grad_batch for p in copied.parameters()]
    torch.testing.assert_close(copied_fields, [p.grad_batch for p in model.parameters()])


def test_state_dict_and_parameters_are_plain() -> None:
    model, plain = extend(network()), network()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert set(vars(model[0])) == set(vars(plain[0]))
    model.load_state_dict(plain.state_dict())
    model(x)
    assert set(vars(model[0])) == set(vars(plain[0])), "a forward leaves nothing on modules"


# --- an extended model is a plain one -----------------------------------------------------------------------------


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


# --- several backwards ---------------------------------------------------------------------------------------------


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


# --- contexts ----------------------------------------------------------------------------------------------------


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


# --- extension_hook ------------------------------------------------------------------------------------------------


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
