"""The public names, their arguments and their order: BackPACK's, which its users and their tools know."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import satchel
from conftest import EXACT, FEATURES, as_list
from satchel import backpack, disable, extend, extensions

FIELDS = {
    "BatchGrad": ("grad_batch", ["subsampling"]),
    "BatchL2Grad": ("batch_l2", []),
    "SumGradSquared": ("sum_grad_squared", []),
    "Variance": ("variance", []),
    "DiagGGNExact": ("diag_ggn_exact", []),
    "DiagGGNMC": ("diag_ggn_mc", ["mc_samples"]),
    "DiagHessian": ("diag_h", []),
    "BatchDiagGGNExact": ("diag_ggn_exact_batch", []),
    "BatchDiagGGNMC": ("diag_ggn_mc_batch", ["mc_samples"]),
    "BatchDiagHessian": ("diag_h_batch", []),
    "SqrtGGNExact": ("sqrt_ggn_exact", ["subsampling"]),
    "SqrtGGNMC": ("sqrt_ggn_mc", ["mc_samples", "subsampling"]),
    "KFAC": ("kfac", ["mc_samples"]),
    "KFLR": ("kflr", []),
    "KFRA": ("kfra", []),
}
x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])


def network(width: int = 6) -> Any:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.parametrize("name", FIELDS)
def test_class_field_and_positional_arguments(name: str) -> None:
    field, leading = FIELDS[name]
    feature = getattr(extensions, name)
    arguments = inspect.signature(feature).parameters
    assert feature.field == feature().field == field
    assert list(arguments)[: len(leading)] == leading
    assert all(p.default is not inspect.Parameter.empty for p in arguments.values()), "every argument has a default"
    assert arguments["scaling"].default == "backpack"
    assert name in extensions.__all__
    assert field in feature.__doc__
    assert name in repr(feature())


def test_sampling_and_approximation_arguments() -> None:
    for sampled in (extensions.DiagGGNMC, extensions.KFAC):
        arguments = inspect.signature(sampled).parameters
        assert arguments["mc_samples"].default == 1 and arguments["generator"].default is None
    for kronecker in (extensions.KFAC, extensions.KFLR):
        assert inspect.signature(kronecker).parameters["approximation"].default is None


def test_package_names() -> None:
    assert {"extend", "backpack", "disable", "backend", "settings"} <= set(satchel.__all__)
    assert set(FIELDS) <= set(extensions.__all__)
    assert {feature.__name__ for feature in FEATURES} == set(FIELDS)


def test_backpack_signature() -> None:
    arguments = inspect.signature(backpack).parameters
    assert next(iter(arguments)) == "extensions" and arguments["extensions"].kind is inspect.Parameter.VAR_POSITIONAL
    assert arguments["extension_hook"].default is None
    assert arguments["debug"].default is False and arguments["retain_graph"].default is False
    assert arguments["strict"].default is True


def test_usage_of_the_readme() -> None:
    model, loss_fn = extend(network()), extend(nn.CrossEntropyLoss())
    loss = loss_fn(model(x), y)
    with backpack(extensions.BatchGrad(), extensions.Variance(), extensions.DiagGGNMC(mc_samples=1), extensions.KFAC()):
        loss.backward()
    for p in model.parameters():
        assert p.grad.shape == p.shape
        assert p.grad_batch.shape == (5, *p.shape)
        assert p.variance.shape == p.diag_ggn_mc.shape == p.shape
        assert [factor.shape[0] for factor in p.kfac] == list(p.shape)


@pytest.mark.parametrize("name", FIELDS)
def test_shapes(name: str) -> None:
    model, loss_fn = extend(network()), extend(nn.CrossEntropyLoss())
    with backpack(getattr(extensions, name)()):
        loss_fn(model(x), y).backward()
    for p in model.parameters():
        value = getattr(p, FIELDS[name][0])
        if name in ("KFAC", "KFLR", "KFRA"):
            assert isinstance(value, list) and [tuple(f.shape) for f in value] == [(n, n) for n in p.shape]
        else:
            columns = {"SqrtGGNExact": (3, 5), "SqrtGGNMC": (1, 5), "BatchL2Grad": (5,)}
            leading = columns.get(name, (5,) if name.startswith("Batch") else ())
            assert tuple(value.shape) == (*leading, *(() if name == "BatchL2Grad" else p.shape))


def test_extend_returns_the_module_and_is_idempotent() -> None:
    model = network()
    assert extend(model) is model
    hooks = [len(m._forward_hooks) for m in model.modules()]
    keys, names = set(vars(model)), [name for name, _ in model.named_modules()]
    assert extend(model) is model and extend(model[0]) is model[0]
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert set(vars(model)) == keys and [name for name, _ in model.named_modules()] == names
    assert type(model) is nn.Sequential and list(model.state_dict()) == list(network().state_dict())


def test_extend_after_a_change_reaches_new_modules() -> None:
    model, loss_fn = extend(network()), extend(nn.CrossEntropyLoss())
    model[2] = nn.Linear(6, 3)
    extend(model)
    with backpack(extensions.BatchGrad()):
        loss_fn(model(x), y).backward()
    assert model[2].weight.grad_batch.shape == (5, 3, 6)


def test_fields_are_overwritten_and_survive_zero_grad() -> None:
    model, loss_fn = extend(network()), extend(nn.CrossEntropyLoss())
    with backpack(extensions.BatchGrad()):
        loss_fn(model(x), y).backward()
        first = model[0].weight.grad_batch
        model.zero_grad()
        assert model[0].weight.grad_batch is first
        loss_fn(model(x[:3]), y[:3]).backward()
    assert model[0].weight.grad_batch.shape[0] == 3 and first.shape[0] == 5


def test_fields_can_be_deleted_and_changed_in_place() -> None:
    """Tools delete fields and scale Kronecker factors in place; neither shows in another field or in the next pass."""
    model, loss_fn = extend(network()), extend(nn.CrossEntropyLoss())
    features = [extensions.KFLR(), extensions.KFRA(), extensions.BatchGrad()]
    for _ in range(2):
        with backpack(*features):
            loss_fn(model(x), y).backward()
        before = [[f.clone() for f in p.kfra] for p in model.parameters()]
        for p in model.parameters():
            for factor in p.kflr:
                factor.mul_(0)
            p.grad_batch.zero_()
        for p, kept in zip(model.parameters(), before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(p.kfra, kept, strict=True))
            assert not hasattr(p, "variance")
            del p.grad_batch
            assert not hasattr(p, "grad_batch") and p.grad.abs().sum() > 0


@pytest.mark.parametrize("width", [6, 1])
@pytest.mark.parametrize("feature", EXACT)
def test_fields_can_be_changed_in_place_as_soon_as_they_are_set(feature: Any, width: int) -> None:
    """By a hook that autograd calls after one parameter, before the fields of the next: another root makes each wait for its gradient.

    A matrix of one unit is contiguous whatever was done to it, and so needs no copy to become a field.
    """
    model, loss_fn = extend(network(width)), extend(nn.CrossEntropyLoss())
    seen: dict[str, list[Tensor]] = {}

    def change(name: str, parameter: Tensor) -> None:
        fields = as_list(getattr(parameter, feature.field))
        seen[name] = [tensor.clone() for tensor in fields]
        for tensor in fields:
            tensor.fill_(torch.nan)

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(change, name))
    with backpack(feature()):
        torch.autograd.backward([loss_fn(model(x), y), model[0].weight.sum()])
    assert len(seen) == 4 and all(tensor.isfinite().all() for tensors in seen.values() for tensor in tensors)


def test_disable_turns_recording_off() -> None:
    model, loss_fn = extend(network()), extend(nn.CrossEntropyLoss())
    with disable():
        loss = loss_fn(model(x), y)
    assert "satchel" not in loss.grad_fn.metadata
    loss.backward()
    loss = loss_fn(model(x), y)
    with backpack(extensions.BatchGrad()):
        loss.backward()
    assert hasattr(model[0].weight, "grad_batch")


def test_backend_and_settings() -> None:
    with satchel.backend("aten"), satchel.backend("triton"):
        pass
    with pytest.raises(ValueError, match="cuda"), satchel.backend("cuda"):
        pass
    with satchel.settings(memory_limit=2**30):
        pass


@pytest.mark.parametrize(
    "name,arguments",
    [
        ("KFAC", {"mc_samples": 0}),
        ("DiagGGNMC", {"mc_samples": -1}),
        ("DiagGGNMC", {"mc_samples": 1.5}),
        ("BatchGrad", {"scaling": "mean"}),
        ("KFLR", {"approximation": "sum"}),
        ("DiagGGNMC", {"generator": 3}),
        ("BatchGrad", {"subsampling": ["a"]}),
    ],
)
def test_bad_arguments(name: str, arguments: dict[str, Any]) -> None:
    """The message names the class, the argument and the value."""
    ((key, value),) = arguments.items()
    with pytest.raises(ValueError) as raised:
        getattr(extensions, name)(**arguments)
    assert name in str(raised.value) and key in str(raised.value) and repr(value) in str(raised.value)


def test_unknown_argument() -> None:
    with pytest.raises(TypeError):
        extensions.BatchL2Grad(mc_samples=1)  # type: ignore[call-arg]
