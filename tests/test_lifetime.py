"""What lives how long: memory, copies."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import FEATURES
from lifetimes import Watch, extended, network, x, y
from satchel import backpack, extend
from satchel.extensions import KFLR, BatchGrad, BatchL2Grad, DiagGGNExact
from satchel.runtime.harvest import Gathered, Harvest
from satchel.runtime.rules import Sizes
from satchel.runtime.uses import Use

# --- memory -----------------------------------------------------------------------------------------------------------


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


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize("feature", [None, *FEATURES])
def test_gradients_that_meet_are_added_in_place(feature: Any) -> None:
    """Autograd makes a tensor of its own for their sum where anybody holds a summand, or has seen its storage."""
    inner = Residual(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model, loss_fn = extend(nn.Sequential(nn.Linear(4, 6), inner, nn.Linear(6, 3))), extend(nn.CrossEntropyLoss())
    addresses: list[int] = []
    for module in (inner, model[0]):
        module.register_forward_hook(
            lambda m, a, out: out.register_hook(lambda g: addresses.append(g.data_ptr())) and None
        )
    loss = loss_fn(model(x.repeat(8, 1)), y.repeat(8))
    with backpack(*[] if feature is None else [feature()]):
        loss.backward()
    above, below = addresses
    assert above == below


@pytest.mark.parametrize("feature", [BatchGrad, DiagGGNExact])
def test_what_a_parameter_gathered_dies_with_its_fields(feature: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on the parameter's node holds what was gathered until the pass ends: by then, no tensor."""
    own, seen = Harvest.reap, []

    def reap(harvest: Harvest, gathered: Gathered, sizes: Sizes) -> list[Use]:
        assert gathered.uses and (
            gathered.ahead is not None or feature is DiagGGNExact or gathered.uses[0].name == "bias"
        )
        assert bool(gathered.swept) is (feature is DiagGGNExact)
        uses = own(harvest, gathered, sizes)
        seen.append((gathered.uses, gathered.swept, gathered.ahead))
        return uses

    monkeypatch.setattr(Harvest, "reap", reap)
    model = extend(nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Flatten()))
    with backpack(feature()):
        extend(nn.CrossEntropyLoss())(model(torch.randn(5, 2, 4, 4)), torch.arange(5)).backward()
    assert seen == [([], {}, None)] * 4


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


# --- copies -----------------------------------------------------------------------------------------------------------


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


def test_fields_share_no_memory_with_gradients_of_outputs() -> None:
    """Those of a bias are these gradients, at one position."""
    model, held = extend(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))), list[Tensor]()
    hidden = model[0](torch.randn(5, 4))
    output = model[1](hidden)
    for tensor in (hidden, output):
        tensor.register_hook(held.append)
    with backpack(BatchGrad()):
        output.square().sum().backward()
    starts = {gradient.untyped_storage().data_ptr() for gradient in held}
    assert len(starts) == 2
    assert starts.isdisjoint(p.grad_batch.untyped_storage().data_ptr() for p in model.parameters())
