"""Every definition: each of its rules against plain autograd of torch's own module, and every feature in a network around it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Case, Network, drawn
from conftest import DEFINITIONS, EXACT, FEATURES, KERNELS, LAYERS, LOSSES, SAMPLED, Agree, Pass, label, module_class
from reference import jacobian
from satchel import extend
from satchel.runtime.averaged import Pair, averaged_quantities
from satchel.runtime.calls import ByRules
from satchel.runtime.evaluate import evaluate
from satchel.runtime.plan import Place, Step
from satchel.runtime.quantities import quantities
from satchel.runtime.record import Record, entries
from satchel.runtime.rules import BLOCK, Need
from satchel.runtime.uses import Use

N, V = 3, 2
#: torch has no double backward, and rounds its slope 1/6 to float32, also in float64.
SINGLE = {"Hardsigmoid"}
EXAMPLES = [
    pytest.param(definition, example, id=f"{definition.name}_{k}")
    for definition in DEFINITIONS.layers
    for k, example in enumerate(definition.examples)
]


class Call:
    """One recorded call of a module on drawn inputs, and its dense Jacobians."""

    def __init__(self, definition: Any, example: Any) -> None:
        torch.manual_seed(0)
        self.module = extend(drawn(module_class(definition), example).double())
        if example.below is None:
            self.x = torch.randn(N, *example.shape, dtype=torch.float64, requires_grad=True)
        else:
            self.x = torch.randint(example.below, (N, *example.shape))
        self.inner = self.x * 1 if example.below is None else self.x
        self.y: Tensor = self.module(self.inner)
        holder = self.y if self.y._base is None or entries(self.y.grad_fn).record else self.y._base
        record = entries(holder.grad_fn).record if holder.grad_fn is not self.inner.grad_fn else None
        self.differentiable, self.record = example.below is None, record

    def draw(self, *lead: int, like: Tensor) -> Tensor:
        return torch.randn(*lead, *like.shape, dtype=torch.float64)

    def jacobian(self, variable: Tensor) -> Tensor:
        """[N, *y, *variable], flat; by the input, of each sample by its own."""
        if variable is self.inner:  # samples do not mix: their sum has the same derivatives
            (dense,) = jacobian(self.y.sum(0), [variable])
            return dense.reshape(-1, N, variable[0].numel()).movedim(1, 0)
        (dense,) = jacobian(self.y, [variable])
        return dense.reshape(N, -1, variable.numel())


def apply(record: Record, rule: Any, *arguments: Tensor) -> Tensor:
    return evaluate(rule, record.definition, record.operand, *arguments)


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("definition,example", EXAMPLES)
def test_passes(definition: Any, example: Any) -> None:
    """Jᵀv, Σ J² d, 1/N Σ JᵀM and 1/N Σ JᵀGJ; the record's input is the module's."""
    call = Call(definition, example)
    record = call.record
    if record is None:
        assert torch.equal(call.y, call.inner), "only the identity needs no record"
        return
    layer, tolerance = record.definition, 1e-7 if definition.name in SINGLE else 1e-10
    if not call.differentiable:
        assert layer.vjp is None
        return
    J, out = call.jacobian(call.inner), record.canonical_output
    columns = call.draw(V, like=call.y)
    same(
        apply(record, layer.vjp, columns.reshape(V, *out)),
        torch.einsum("nyx,vny->vnx", J, columns.flatten(2)),
        tolerance,
    )
    if layer.diagonal is not None:
        d = columns[0]
        same(apply(record, layer.diagonal, d.reshape(out)), torch.einsum("nyx,ny->nx", J**2, d.flatten(1)), tolerance)
    if layer.mean_vjp is not None:
        rows = call.draw(V, like=call.y[0])
        wanted = torch.einsum("nyx,vy->vx", J, rows.flatten(1)) / N
        same(apply(record, layer.mean_vjp, rows.reshape(V, *out[1:])), wanted, tolerance)
    if layer.sandwich is not None:
        size = call.y[0].numel()
        G = torch.randn(size, size, dtype=torch.float64)
        wanted = torch.einsum("nyx,yz,nzw->xw", J, G, J) / N
        same(apply(record, layer.sandwich, G.reshape(*out[1:], *out[1:])), wanted, tolerance)


@pytest.mark.parametrize("definition,example", [e for e in EXAMPLES if e.values[0].name not in SINGLE])
def test_second_derivative(definition: Any, example: Any) -> None:
    """Σ δ ∂²y/∂x∂x′ v, diagonal or not; where a definition has neither, it is zero."""
    call = Call(definition, example)
    record = call.record
    if record is None or not call.differentiable:
        return
    layer = record.definition
    delta, tangents = call.draw(like=call.y).requires_grad_(), call.draw(V, like=call.inner)
    (slope,) = torch.autograd.grad(call.y, call.inner, delta, create_graph=True)
    wanted = torch.stack(
        [torch.autograd.grad(slope, call.inner, t, retain_graph=True, materialize_grads=True)[0] for t in tangents]
    )
    delta = delta.detach().reshape(record.canonical_output)
    if layer.hessian is not None:
        found = apply(record, layer.hessian, delta, tangents.reshape(V, *record.canonical_input))
    elif layer.residual is not None:
        found = apply(record, layer.residual, delta).reshape(call.x.shape) * tangents
    else:
        found = torch.zeros_like(wanted)
    same(found, wanted)


def of_pullback(T: Tensor, sign: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...], Tensor]]:
    """Quantities of T [V, N, P]: name, what the rule takes besides the factor, value."""
    signed = sign[..., None] * T**2
    yield "per_sample", (), T
    yield "sample_squares", (), (T**2).sum(0)
    yield "signed_sample_squares", (sign,), signed.sum(0)
    yield "squared_norm", (), (T**2).sum((0, 2))
    yield "sum_of_squares", (), (T**2).sum((0, 1))
    yield "signed_sum_of_squares", (sign,), signed.sum((0, 1))
    yield "squared_deviations", (), ((T - T.mean(1, keepdim=True)) ** 2).sum((0, 1))
    yield "block", (), torch.einsum("vnp,vnq->pq", T, T)


@pytest.mark.parametrize("definition,example", [e for e in EXAMPLES if e.values[0].parameters])
def test_quantities(definition: Any, example: Any) -> None:
    """What a factor leaves on each parameter. (Kronecker factors: see test_features_around.)"""
    call = Call(definition, example)
    record = call.record
    assert record is not None
    columns, sign = call.draw(V, like=call.y), torch.randn(V, N, dtype=torch.float64)
    checked = set()
    for name, parameter in call.module.named_parameters():
        J, offered = call.jacobian(parameter), record.definition.parameters[name]
        T = torch.einsum("nyp,vny->vnp", J, columns.flatten(2))
        for quantity, extra, wanted in of_pullback(T, sign):
            if quantity in offered:
                use = Use(record, name, columns.reshape(V, *record.canonical_output))
                same(quantities([use], [quantity], *extra)[quantity], wanted)
                checked.add(quantity)
        for quantity, over in {"sample_diagonal": (), "diagonal_sum": (0,)}.items():
            if quantity in offered:
                d = Use(record, name, columns[0].reshape(record.canonical_output))
                wanted = torch.einsum("nyp,ny->np", J**2, columns[0].flatten(1))
                same(d.value(quantity, d.factor), wanted.sum(over) if over else wanted)
                checked.add(quantity)
        if BLOCK in offered:
            size, need = call.y[0].numel(), Need("averaged", BLOCK)
            G = torch.randn(size, size, dtype=torch.float64)
            place = Place(Step(call.y.grad_fn, record, ()), ByRules(record, {name: parameter}), name)
            pair = Pair(place, place, (record.output_nr, record.output_nr), G)
            same(averaged_quantities([pair], [need])[need], torch.einsum("nyp,yz,nzq->pq", J, G, J) / N)
    assert not list(call.module.parameters()) or {"per_sample", "sum_of_squares", "squared_norm"} <= checked


# --- features in a network around the layer --------------------------------------------------------------------------


def rotating(layer: Network) -> Case:
    """One loss and reduction for each layer; neighbours have others."""
    choices = list(itertools.product(LOSSES, ("mean", "sum")))
    return Case(layer, *choices[sum(map(ord, layer.name)) % len(choices)])


def expected(case: Case, feature: type, **options: Any) -> dict[str, Any]:
    reference = case.reference()
    return {name: reference.field(feature.__name__, name, **options) for name in reference.parameters}


def tolerance(layer: Network) -> float | None:
    return 1e-6 if layer.name.rpartition("_")[0] in SINGLE else None


@pytest.mark.parametrize("backend", ["aten", *KERNELS])
def test_features_around(layer: Network, backend: str, agree: Agree) -> None:
    case = rotating(layer)
    done = Pass(case, torch.float64, backend, *(feature() for feature in EXACT))
    for feature in EXACT:
        if not (feature.__name__.endswith("DiagHessian") and layer.name.rpartition("_")[0] in SINGLE):
            agree(done.fields(feature), expected(case, feature), tolerance(layer))


def test_sampled_features_around(layer: Network, agree: Agree) -> None:
    case = rotating(layer)
    done = Pass(case, torch.float64, "aten", *(feature() for feature in SAMPLED), reveal=True)
    drawn_curvature = done.model.curvature(done.model.probe.weight.diag_ggn_mc)
    for feature in SAMPLED:
        agree(done.fields(feature), expected(case, feature, curvature=drawn_curvature), tolerance(layer))


@pytest.mark.parametrize("approximation", ["backpack", "expand", "reduce"])
@pytest.mark.parametrize(
    "layer", [n for n in LAYERS if len(n.shape) > 2 and list(n.model()[-3].parameters())], ids=label
)
def test_approximations_around(layer: Network, approximation: str, agree: Agree) -> None:
    """Where a layer has positions and parameters; the default is among them."""
    case = rotating(layer)
    feature: Callable[..., Any] = next(f for f in FEATURES if f.__name__ == "KFLR")
    done = Pass(case, torch.float64, "aten", feature(approximation=approximation))
    agree(done.fields(feature), expected(case, feature, approximation=approximation))  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [n for n in LAYERS if n.below is None], ids=label)
def test_fields_are_the_same_for_any_layout(layer: Network, agree: Agree) -> None:
    """An input that is not contiguous (or channels last) changes nothing; neither does a batch of one."""
    strided = Network(layer.name, layer.build, (1, *layer.shape[1:]), strided=True)
    case = Case(strided, nn.MSELoss, "mean")
    features = [f for f in EXACT if f.__name__ in ("BatchGrad", "DiagGGNExact", "KFLR")]
    done = Pass(case, torch.float64, "aten", *(feature() for feature in features))
    for feature in features:
        agree(done.fields(feature), expected(case, feature), tolerance(layer))
