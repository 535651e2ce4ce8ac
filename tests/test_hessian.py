"""DiagHessian's ways to pass a curvature give the same numbers, and what they are made of is exact."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import satchel
from cases import Case, Network, Wired
from conftest import Agree, Pass
from networks import NETWORKS
from reference import own_sample
from satchel.extensions import KFRA, DiagHessian
from satchel.registry import REGISTRY
from satchel.runtime import rules
from satchel.runtime.cost import forced
from satchel.runtime.passing import edge_shape, pull
from satchel.runtime.plan import Step
from satchel.runtime.residual import Blocks, Diagonal, residual_of, signed_pairs, upper_rows
from satchel.runtime.second import is_linear, second_derivative
from satchel.runtime.sweep import add, take
from test_passing import OPS, X, _steps


def gelu_net(m: Any, x: Tensor) -> Tensor:
    """Operations without a definition only, stacked, elementwise ones between the layers."""
    h = F.silu(m.a(x)).reshape(-1, 6)
    return m.head(F.gelu(torch.sin(m.b(h)) * 2))


def transposed(m: Any, x: Tensor) -> Tensor:
    """The batch is not the first axis between two layers: matrices cannot pass there, columns can."""
    return m.head(m.act(m.b((m.act(m.a(x)).transpose(0, 1) * 2).transpose(0, 1))))


def coupled(m: Any, x: Tensor) -> Tensor:
    """Products of branches that have met before and meet again."""
    h = m.act(m.a(x))
    return m.head(h * F.relu(h) + h * torch.sigmoid(m.b(h)) - F.softmax(m.b(h) * h, 1))


def deep(*widths: int) -> list[nn.Module]:
    return [m for sizes in itertools.pairwise(widths) for m in (nn.Linear(*sizes), nn.Sigmoid())]


MORE = [
    Network("gelu_net", lambda: Wired(gelu_net, a=nn.Linear(4, 6), b=nn.Linear(6, 5), head=nn.Linear(5, 3))),
    Network(
        "transposed",
        lambda: Wired(transposed, a=nn.Linear(4, 6), b=nn.Linear(6, 7), act=nn.Tanh(), head=nn.Linear(7, 3)),
        (5, 2, 4),
    ),
    Network(
        "coupled", lambda: Wired(coupled, a=nn.Linear(4, 6), b=nn.Linear(6, 6), act=nn.Tanh(), head=nn.Linear(6, 3))
    ),
    Network("deep", lambda: nn.Sequential(*deep(4, 6, 5, 7, 5, 6), nn.Linear(6, 3))),
]
CURVED = [*NETWORKS, *MORE]


def check(network: Network, loss: Any, dtype: torch.dtype, agree: Agree) -> None:
    case = Case(network, loss, "mean")
    reference = case.reference()
    done = Pass(case, dtype, "aten", DiagHessian())
    agree(done.fields(DiagHessian), {name: reference.DiagHessian(name) for name in reference.parameters})


@pytest.mark.parametrize("program", ["columns", "dense"])
@pytest.mark.parametrize("network", CURVED, ids=lambda n: n.name)
def test_columns_or_matrices(network: Network, loss: Any, dtype: torch.dtype, program: str, agree: Agree) -> None:
    with forced(program):
        check(network, loss, dtype, agree)


@pytest.mark.parametrize("limit", [2_000, 10_000])
@pytest.mark.parametrize("program", ["columns", "dense"])
@pytest.mark.parametrize(
    "name", ["skip_sequence", "gated", "attention", "normalised", "siamese", "coupled", "recurrent"]
)
def test_ranges_of_columns(name: str, limit: int, program: str, agree: Agree) -> None:
    network = next(n for n in CURVED if n.name == name)
    with satchel.settings(memory_limit=limit), forced(program):
        check(network, nn.CrossEntropyLoss, torch.float64, agree)


# --- second derivatives of nodes -----------------------------------------------------------------------------------

REFUSED = {"cdist"}  # test_errors_of_modules.py


def step_of(y: Tensor, x: Tensor) -> Step:
    """The node of y, as a plan has it where something wanted lies below x."""
    node = y.grad_fn
    assert node is not None and x.grad_fn is not None
    following = enumerate(node.next_functions)
    return Step(node, None, tuple((k, (below, nr)) for k, (below, nr) in following if below is not None))


def dense(residual: Diagonal | Blocks | None, step: Step, samples: int) -> Tensor:
    """Σ_o δ_o ∂²y_o/∂x∂x′ of the only edge [N, X, X]."""
    (edge,) = {edge for _, edge in step.inputs}
    if isinstance(residual, Diagonal):
        return torch.diag_embed(residual.by_edge[edge].reshape(samples, -1))
    if residual is None:
        size = torch.Size(edge_shape(edge)).numel() // samples
        return torch.zeros(samples, size, size)
    found = residual.dense()[edge, edge]
    torch.testing.assert_close(residual.diagonal()[edge].reshape(samples, -1), found.diagonal(dim1=1, dim2=2))
    for at_most in (1, 5, 10_000):
        parts = [(s[edge], signs) for s, signs in residual.signed_columns(at_most)]
        assert sum(len(signs) for _, signs in parts) <= residual.columns
        by_columns = torch.zeros_like(found)
        for s, signs in parts:
            assert len(s) <= max(at_most, 2)
            flat = s.reshape(len(s), samples, -1)
            by_columns += torch.einsum("vnx,vn,vny->nxy", flat, signs, flat)
        torch.testing.assert_close(by_columns, found)
    return found


ONE_NODE: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "square": lambda x: x * x,
    "power": lambda x: x**3,
    "softmax": lambda x: x.softmax(1),
    "softmax of rows": lambda x: x.softmax(2),
    "glu": lambda x: F.glu(x, 1),
    "logsumexp": lambda x: x.logsumexp(1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "layer norm of rows": lambda x: F.layer_norm(x, x.shape[2:]),
    "prod": lambda x: x.prod(2),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "neg": lambda x: -x,
}
#: Elements of a class: those that a column meets at once.
CLASSES = {"sin": None, "gelu": None, "square": None, "power": None, "softmax": 2, "softmax of rows": 4, "glu": 2}


@pytest.mark.parametrize("name", ONE_NODE)
def test_second_derivative_of_a_node(name: str) -> None:
    """Against dense autograd, and with the structure that it has."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, dtype=torch.float64, generator=generator).requires_grad_() * 1
    y = ONE_NODE[name](x)
    step = step_of(y, x)
    delta = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    (slope,) = torch.autograd.grad(y, x, delta, create_graph=True)
    wanted = torch.zeros(3, 8, 8, dtype=torch.float64)
    if slope.requires_grad:
        rows = [torch.autograd.grad(s, x, retain_graph=True)[0] for s in slope.flatten()]
        wanted = own_sample(torch.stack(rows).reshape(3, 8, 3, 8))
    residual = residual_of(step, {0: delta}, 3)
    torch.testing.assert_close(dense(residual, step, 3).double(), wanted)
    if CLASSES.get(name):
        assert isinstance(residual, Blocks) and residual.members.shape == (8 // CLASSES[name], CLASSES[name])
    elif name in CLASSES:
        assert isinstance(residual, Diagonal)
    assert (residual is None) == (not wanted.any())
    assert is_linear(step) == (not slope.requires_grad)


@pytest.mark.parametrize("name", sorted(OPS.keys() - REFUSED))
def test_second_derivatives_of_any_graph(name: str) -> None:
    """Σ over nodes of Jᵀ (Σ_y δ_y ∂²y) J is the second derivative of the whole, also where one input is computed from another."""
    torch.manual_seed(5)
    x = torch.randn(X, dtype=torch.float64, requires_grad=True) * 1
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        try:
            torch.manual_seed(6)
            y = OPS[name](x)
            torch.manual_seed(6)
            with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
                twice = OPS[name](x)
        finally:
            torch.set_default_dtype(torch.float32)
    delta = torch.randn(y.shape, dtype=y.dtype)
    (slope,) = torch.autograd.grad(twice, x, delta, create_graph=True)
    wanted = torch.zeros(x.numel(), x.numel(), dtype=torch.float64)
    if slope.requires_grad:
        rows = [torch.autograd.grad(s, x, retain_graph=True, materialize_grads=True)[0] for s in slope.flatten()]
        wanted = torch.stack(rows).flatten(1)
    found = torch.zeros_like(wanted)
    steps = _steps(y.grad_fn, x.grad_fn)
    live = {(y.grad_fn, y.output_nr): delta[None]}
    for number, step in enumerate(steps):
        arrived = take(live, step)
        if not arrived:
            continue
        derivative = second_derivative(step, {nr: d[0] for nr, d in arrived.items()})
        if derivative is not None:
            sizes = [torch.Size(edge_shape(edge)).numel() for edge in derivative.edges]
            parts = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
            tangents = {e: p.reshape(-1, *edge_shape(e)) for e, p in zip(derivative.edges, parts, strict=True)}
            second = torch.cat([derivative(tangents)[edge].flatten(1) for edge in derivative.edges], 1)
            for below in steps[number + 1 :]:
                columns = take(tangents, below)
                if columns:
                    add(tangents, pull(below, columns))
            (J,) = tangents.values()
            found += J.flatten(1).T.double() @ second.double() @ J.flatten(1).double()
        add(live, pull(step, arrived))
    scale = max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(found / scale, wanted / scale, rtol=1e-5, atol=1e-5 if name == "to" else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spread", [0, 3, 6])
def test_signed_pairs_lose_no_digits(dtype: torch.dtype, spread: int) -> None:
    """Rows of very different sizes: the error stays at rounding of each pair's own entries."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-spread, spread, 9, dtype=torch.float64)
    M = torch.randn(4, 9, 9, dtype=torch.float64, generator=generator)
    M = (M + M.mT) * scales[:, None] * scales
    rows = upper_rows(M.to(dtype).transpose(0, 1), 0)
    columns, signs = signed_pairs(torch.arange(9), rows)
    wide = columns.double()
    found = torch.einsum("vnx,vn,vny->nxy", wide, signs.double(), wide)
    size = torch.einsum("vnx,vny->nxy", wide.abs(), wide.abs())
    assert (found - M.to(dtype).double()).abs().max() <= 8 * torch.finfo(dtype).eps * M.abs().max()
    assert ((found - M.to(dtype).double()).abs() <= 8 * torch.finfo(dtype).eps * size).all()


# --- rules that a layer does not have --------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [("diagonal",), ("mean_vjp", "sandwich"), ("diagonal", "mean_vjp", "sandwich")])
@pytest.mark.parametrize("name", ["sigmoid_tanh", "skip_sequence", "double_skip", "flatten", "siamese"])
def test_rules_composed_from_vjp(
    name: str, absent: tuple[str, ...], agree: Agree, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = tuple(dataclasses.replace(layer, **dict.fromkeys(absent)) for layer in REGISTRY.layers)
    monkeypatch.setattr(rules, "_installed", dataclasses.replace(REGISTRY, layers=layers))
    network = next(n for n in NETWORKS if n.name == name)
    case = Case(network, nn.CrossEntropyLoss, "mean")
    done, reference = Pass(case, torch.float64, "aten", DiagHessian(), KFRA()), case.reference()
    for feature in (DiagHessian, KFRA):
        wanted = {name: reference.field(feature.__name__, name) for name in reference.parameters}
        agree(done.fields(feature), wanted)


def test_hessian_rule(agree: Agree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's own second derivative, not diagonal or not said to be: Σ_y δ_y ∂²y/∂x∂x′ v."""

    def hessian(delta: Tensor, tangent: Tensor, output: Tensor) -> Tensor:
        return -2 * output * (1 - output.square()) * delta * tangent

    rule = rules.Rule(hessian, ("output",))
    layers = tuple(
        dataclasses.replace(layer, residual=None, hessian=rule) if layer.module is nn.Tanh else layer
        for layer in REGISTRY.layers
    )
    monkeypatch.setattr(rules, "_installed", dataclasses.replace(REGISTRY, layers=layers))
    for name in ("sigmoid_tanh", "sequence_bias_free", "nested"):
        check(next(n for n in NETWORKS if n.name == name), nn.MSELoss, torch.float64, agree)


@pytest.mark.parametrize("program", ["columns", "dense"])
@pytest.mark.parametrize("name", ["gelu_net", "coupled", "recurrent"])
def test_nothing_stays_alive(name: str, program: str) -> None:
    """What is differentiated twice is freed by reference counts: the saved tensors of the forward pass die with it."""
    network = next(n for n in CURVED if n.name == name)
    gc.collect()
    gc.disable()
    try:
        counts = []
        for _ in range(3):
            with forced(program):
                Pass(Case(network, nn.MSELoss, "mean"), torch.float64, "aten", DiagHessian())
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[2] <= counts[1]
