"""float32: every definition beside float64 on the same numbers, far from zero, at kinks, and where sums cancel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import satchel
from cases import drawn
from conftest import DEFINITIONS, module_class
from satchel import extend
from satchel.runtime.evaluate import evaluate
from satchel.runtime.quantities import quantities
from satchel.runtime.record import entries
from satchel.runtime.uses import Use

N = 3
EXAMPLES = [
    pytest.param(definition, example, id=f"{definition.name}_{k}")
    for definition in DEFINITIONS.layers
    for k, example in enumerate(definition.examples)
    if example.below is None and definition.name != "Identity"
]
ACTIVATIONS = [p for p in EXAMPLES if len(p.values[0].statements) == 1 and not p.values[0].parameters]
ELEMENTWISE = [
    p for p in ACTIVATIONS if p.values[0].name != "Flatten" and p.values[0].input.indices == p.values[0].output.indices
]
NORMS = [
    p
    for p in EXAMPLES
    if p.values[0].name.rstrip("123d") in ("LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm", "BatchNorm")
]


def record_of(module: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    y = module(x * 1)
    record = entries(y.grad_fn).record or entries(y._base.grad_fn).record
    assert record is not None
    return y, record


def rules(module: nn.Module, x: Tensor, columns: Tensor, tangents: Tensor) -> dict[str, Tensor]:
    """The values of every rule and quantity, in the inputs' precision."""
    _, record = record_of(module, x)
    layer, out = record.definition, record.canonical_output
    S = columns.reshape(len(columns), *out)
    found = {"vjp": evaluate(layer.vjp, layer, record.operand, S)}
    if layer.residual is not None:
        found["residual"] = evaluate(layer.residual, layer, record.operand, S[0])
    if layer.hessian is not None:
        v = tangents.reshape(len(tangents), *record.canonical_input)
        found["hessian"] = evaluate(layer.hessian, layer, record.operand, S[0], v)
    for name, _ in module.named_parameters():
        wanted = [
            q
            for q in ("per_sample", "squared_norm", "sum_of_squares", "squared_deviations")
            if q in layer.parameters[name]
        ]
        found |= {f"{name}.{q}": value for q, value in quantities([Use(record, name, S)], wanted).items()}
    return found


def torchs_own(module: nn.Module, x: Tensor, columns: Tensor, tangents: Tensor) -> dict[str, Tensor]:
    """What torch's backward and double backward make of the same."""
    h = x * 1
    y = module(h)
    found = {"vjp": torch.stack([torch.autograd.grad(y, h, c, retain_graph=True)[0] for c in columns])}
    delta = columns[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(y, h, delta, create_graph=True)
    try:
        second = [torch.autograd.grad(slope, h, t, retain_graph=True, materialize_grads=True)[0] for t in tangents]
    except RuntimeError:  # Hardsigmoid has none
        return found
    return found | {"hessian": torch.stack(second)}


def compare(definition: Any, example: Any, offset: float, tolerance: float, backend: str = "aten") -> None:
    """Relative to the largest entry; where the numbers are ill conditioned, twice torch's own error."""
    torch.manual_seed(0)
    module = extend(drawn(module_class(definition), example))
    x = (offset + torch.randn(N, *example.shape)).requires_grad_()
    y = module(x)
    columns, tangents = torch.randn(2, *y.shape), torch.randn(2, *x.shape)
    theirs = torchs_own(module, x, columns, tangents)
    with satchel.backend(backend):
        single = rules(module, x, columns, tangents)
    double = rules(module.double(), x.detach().double().requires_grad_(), columns.double(), tangents.double())
    for name, wanted in double.items():
        scale = wanted.abs().max().item() or 1.0

        def error(found: Tensor, wanted: Tensor = wanted, scale: float = scale) -> float:
            return (found.double().reshape(wanted.shape) - wanted).abs().max().item() / scale

        allowed = max(tolerance, 2 * error(theirs[name])) if name in theirs else tolerance
        assert single[name].dtype == torch.float32
        assert error(single[name]) <= allowed, f"{name}: {error(single[name]):.1e} > {allowed:.1e}"


@pytest.mark.parametrize("definition,example", EXAMPLES)
def test_single_precision(definition: Any, example: Any) -> None:
    compare(definition, example, 0.0, 1e-5)


@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize("definition,example", NORMS)
def test_norms_of_a_large_mean(definition: Any, example: Any, backend: str) -> None:
    """Mean 1e3, deviation 1: an expanded variance would cancel, and the mean's own rounding, 1e3 · 6e-8, would stay in x̂."""
    compare(definition, example, 1e3, 1e-5, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("definition,example", ELEMENTWISE)
def test_activations_far_from_zero(definition: Any, example: Any, dtype: torch.dtype) -> None:
    """Value and derivatives are finite, and torch's own, at ±1e4 and whatever overflows an exponential."""
    points = torch.tensor([-1e4, -700.0, -100.0, -20.0, -5.0, 5.0, 20.0, 100.0, 700.0, 1e4])
    agree_with_torch(definition, example, points, dtype)


#: Where a definition has its kinks, by the options of the module that say so; 0 for all.
KINKS = ("lambd", "min_val", "max_val", "threshold")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("definition,example", ELEMENTWISE)
def test_activations_at_kinks(definition: Any, example: Any, dtype: torch.dtype) -> None:
    """Torch's value at the kink itself, and beside it."""
    module = drawn(module_class(definition), example)
    given = [float(getattr(module, name)) for name in KINKS if isinstance(getattr(module, name, None), int | float)]
    centres = torch.tensor([0.0, 3.0, -3.0, 6.0, *given, *(-k for k in given)], dtype=dtype)
    points = torch.cat([centres, centres.nextafter(centres + 1), centres.nextafter(centres - 1)])
    agree_with_torch(definition, example, points, dtype)


#: torch's double backward takes 0 for the second derivative at 0, where its backward takes the slope of the negative side.
INCONSISTENT_AT_ZERO = ("ELU", "CELU", "SELU")
#: In float64, torch's own: it rounds 1/6 of Hardsigmoid, and CELU's 1/alpha, to float32.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-7}


def agree_with_torch(definition: Any, example: Any, points: Tensor, dtype: torch.dtype) -> None:
    """Slope and second derivative at points, beside torch's backward and double backward."""
    module = extend(drawn(module_class(definition), example))
    x = points.to(dtype)[:, None].expand(-1, 6).clone().requires_grad_()
    y, record = record_of(module, x)
    layer, one, h = record.definition, torch.ones_like(y), x

    def same(found: Tensor, wanted: Tensor, where: Tensor) -> None:
        assert found.isfinite().all()
        torch.testing.assert_close(
            found.reshape(h.shape)[where], wanted[where], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )

    (slope,) = torch.autograd.grad(y, h, one, create_graph=True, retain_graph=True)
    ours = evaluate(layer.vjp, layer, record.operand, one.reshape(1, *record.canonical_output))
    same(ours, slope.detach(), torch.ones_like(h, dtype=torch.bool))
    if definition.name == "Hardsigmoid":
        return  # torch has no double backward of it
    wanted = torch.zeros_like(h)
    if slope.requires_grad:
        (wanted,) = torch.autograd.grad(slope.sum(), h, retain_graph=True, materialize_grads=True)
    second = torch.zeros_like(h)
    if layer.residual is not None:
        second = evaluate(layer.residual, layer, record.operand, one.reshape(record.canonical_output))
    comparable = wanted.isfinite()  # torch's second derivative of Mish overflows
    same(second, wanted, comparable & (h != 0) if definition.name in INCONSISTENT_AT_ZERO else comparable)
