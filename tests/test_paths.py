"""What happens between the modules: dead ends, operations, ranges of columns, and wiring drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import satchel
from cases import Wired
from conftest import EXACT, FEATURES, Agree, comparable
from graphs import built, check, labels, two_heads, values, x
from reference import Reference, contributions
from satchel import backpack, extend
from satchel.extensions import (
    KFLR,
    BatchGrad,
    DiagGGNExact,
    SqrtGGNExact,
)

# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
def test_unused_parameters_have_no_fields(feature: Any) -> None:
    """Modules that are not called, or whose output does not reach the loss, are not computed: and that is no error."""

    def wire(m: Any, x: Tensor) -> Tensor:
        m.dead(x)
        return m.a(x)

    model: Any = extend(Wired(wire, a=nn.Linear(4, 3), dead=nn.Linear(4, 2), uncalled=nn.Linear(1, 1)).double())
    loss = extend(nn.MSELoss())
    with backpack(feature()):
        loss(model(x), values).backward()
    assert hasattr(model.a.weight, feature.field)
    for module in (model.dead, model.uncalled):
        assert not any(hasattr(p, feature.field) for p in module.parameters())


def test_detached_branch_is_constant(agree: Agree) -> None:
    def wire(m: Any, x: Tensor) -> Tensor:
        h = m.act(m.a(x))
        return m.head(h + m.b(h).detach())

    def build() -> nn.Module:
        return Wired(
            wire, a=nn.Linear(4, 6), act=nn.Tanh(), b=nn.Linear(6, 6).requires_grad_(False), head=nn.Linear(6, 3)
        )

    features = [feature for feature in EXACT if feature.__name__ != "KFRA"]  # its reference knows no detach
    loss = extend(nn.CrossEntropyLoss())
    check(agree, build, lambda f: loss(f, labels), [contributions(nn.CrossEntropyLoss(), labels)], features)


def test_input_with_gradient(agree: Agree) -> None:
    """An input that requires a gradient gets it, and changes nothing else."""
    inputs = x.clone().requires_grad_()
    loss = extend(nn.CrossEntropyLoss())
    build = lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))  # noqa: E731
    check(agree, build, lambda f: loss(f, labels), [contributions(nn.CrossEntropyLoss(), labels)], EXACT, inputs)
    assert inputs.grad is not None


def test_only_part_is_extended(agree: Agree) -> None:
    """A parameterless module that was not extended passes as an op."""
    model = built(lambda: nn.Sequential(nn.Linear(4, 6), nn.Flatten(), nn.Linear(6, 3)))
    extend(model[0])
    extend(model[2])
    loss = extend(nn.MSELoss())
    with backpack(DiagGGNExact(), KFLR()):
        loss(model(x), values).backward()
    build = lambda: nn.Sequential(nn.Linear(4, 6), nn.Flatten(), nn.Linear(6, 3))  # noqa: E731
    reference = Reference(built(build), [x], [contributions(nn.MSELoss(), values)])
    for feature in (DiagGGNExact, KFLR):
        fields = {name: comparable(feature, getattr(p, feature.field)) for name, p in model.named_parameters()}
        agree(fields, {name: reference.field(feature.__name__, name) for name in fields})


def test_keyword_call() -> None:
    model: Any = extend(built(lambda: nn.Linear(4, 3)))
    loss = extend(nn.MSELoss())
    with backpack(BatchGrad(), DiagGGNExact()):
        loss(target=values, input=model(input=x)).backward()
    torch.testing.assert_close(model.weight.grad_batch.sum(0), model.weight.grad)
    assert hasattr(model.weight, "diag_ggn_exact")


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "narrow": lambda h: h.narrow(1, 1, 4),
    "index": lambda h: h[:, [0, 3, 3, 1]],
    "slice with step": lambda h: h[:, ::2],
    "flip": lambda h: h.flip(1),
    "roll": lambda h: h.roll(2, 1),
    "pad": lambda h: F.pad(h, (1, 2)),
    "sum": lambda h: h.sum(1, keepdim=True),
    "cumsum": lambda h: h.cumsum(1),
    "broadcast": lambda h: h[:, :1] + h,
    "repeat": lambda h: h.repeat(1, 2),
    "where": lambda h: torch.where(torch.tensor([True, False, True, True, False, True]), h, 0.0),
    "matmul": lambda h: h @ torch.arange(12.0, dtype=torch.float64).view(6, 2),
    "einsum": lambda h: torch.einsum("ni,ij->nj", h, torch.arange(12.0, dtype=torch.float64).view(6, 2)),
    "scaled by samples": lambda h: h * torch.arange(1.0, 6.0, dtype=torch.float64)[:, None],
    "unbind": lambda h: torch.stack(h.unbind(1)[1:4], 1),
    "add to itself": lambda h: h + h,
    "in-place scaling": lambda h: (h * 1.0).mul_(2.0).add_(1.0),
    "clone": lambda h: h.clone(),
    "masked": lambda h: h.masked_fill(torch.tensor([True, False, False, True, False, False]), 0.0),
    "expanded and reduced": lambda h: h[:, None].expand(-1, 3, -1).sum(1),
    "tensordot": lambda h: torch.tensordot(h, torch.arange(12.0, dtype=torch.float64).view(6, 2), dims=([1], [0])),
}
NONLINEAR_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "square": lambda h: h.square(),
    "exp": lambda h: h.exp(),
    "elu": lambda h: F.elu(h),
    "functional relu": lambda h: F.relu(h),
    "functional tanh": lambda h: torch.tanh(h),
    "softplus": lambda h: F.softplus(h),
    "layer norm": lambda h: F.layer_norm(h, (6,)),
    "norm": lambda h: h.norm(dim=1, keepdim=True),
    "softmax": lambda h: h.softmax(1),
    "logsumexp": lambda h: h.logsumexp(1, keepdim=True),
    "max": lambda h: h.max(1, keepdim=True).values,
    "topk": lambda h: h.topk(3, 1).values,
    "product": lambda h: h * h.flip(1),
    "division": lambda h: h / (2 + h[:, :1].square()),
    "quadratic": lambda h: torch.einsum("ni,nj->nij", h, h).flatten(1),
    "prod": lambda h: h.prod(1, keepdim=True),
    "leaky": lambda h: F.leaky_relu(h, 0.1),
    "times relu": lambda h: h * F.relu(h),
    "times a function of itself": lambda h: (
        h * torch.sigmoid(h @ torch.arange(36.0, dtype=torch.float64).view(6, 6).sin())
    ),
    "times itself": lambda h: h * h,
    "Gram matrix": lambda h: (h.view(-1, 3, 2) @ h.view(-1, 3, 2).transpose(1, 2)).flatten(1),
    "gated halves": lambda h: F.glu(h),
    "cosine": lambda h: F.cosine_similarity(h[:, :3], h[:, 3:], dim=1)[:, None],
    "sigmoid of a part": lambda h: torch.cat([h[:, :2].sigmoid(), h[:, 2:]], 1),
    "in-place tanh": lambda h: (h * 1.0).tanh_(),
    "attention": lambda h: F.scaled_dot_product_attention(h.view(-1, 3, 2), h.view(-1, 3, 2), h.view(-1, 3, 2)).flatten(
        1
    ),
}
#: One call, but several nodes for autograd: KFRA, which averages node by node, is another number for them.
COMPOSITE = {"cosine", "attention"}


def around_op(op: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        width = op(torch.zeros(5, 6, dtype=torch.float64)).shape[1]
        return Wired(lambda m, x: m.b(op(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(width, 3))

    return build


@pytest.mark.parametrize("name", [*OPS, *NONLINEAR_OPS])
def test_any_op(name: str, agree: Agree) -> None:
    """An operation without a definition passes curvature by its own backward, and its second derivative is that one's derivative."""
    op = {**OPS, **NONLINEAR_OPS}[name]
    loss = extend(nn.CrossEntropyLoss())
    losses = [contributions(nn.CrossEntropyLoss(), labels)]
    features = [feature for feature in EXACT if name not in COMPOSITE or feature.__name__ != "KFRA"]
    with sdpa_kernel(SDPBackend.MATH):
        check(agree, around_op(op), lambda f: loss(f, labels), losses, features)


@pytest.mark.parametrize("feature", FEATURES)
def test_python_function(feature: Any) -> None:
    """A user's autograd.Function is an op like any other."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return 2 * h

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    fields = []
    for op in (Double.apply, lambda h: 2 * h):
        model: Any = extend(built(around_op(op)))
        loss = extend(nn.MSELoss())
        torch.manual_seed(0)
        with backpack(feature()):
            loss(model(x), values).backward()
        fields.append(getattr(model.a.weight, feature.field))
    torch.testing.assert_close(*fields)


@pytest.mark.parametrize("limit", [500, 2_000, 20_000])
@pytest.mark.parametrize("feature", [f for f in EXACT if f.__name__ != "KFRA"])
def test_factors_in_ranges_of_columns(limit: int, feature: Any, agree: Agree) -> None:
    """Under a memory limit a factor passes in several ranges of its columns; nothing else changes."""
    loss = extend(nn.CrossEntropyLoss())
    build = lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Sigmoid())  # noqa: E731
    inputs = torch.randn(5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 1]])
    with satchel.settings(memory_limit=limit):
        check(
            agree, build, lambda f: loss(f, target), [contributions(nn.CrossEntropyLoss(), target)], [feature], inputs
        )


def test_columns_keep_their_order_in_ranges() -> None:
    """A square root has the columns of one sweep, whatever the ranges that it was swept in."""
    found = []
    for limit in (None, 300, 2_000):
        model, loss = extend(built(two_heads)), extend(nn.CrossEntropyLoss())
        with satchel.settings(memory_limit=limit), backpack(SqrtGGNExact()):
            loss(model(x)[0], labels).backward()
        found.append(model.a.weight.sqrt_ggn_exact)
    assert found[0].shape == (3, 5, 6, 4)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_columns_of_several_losses_stand_side_by_side() -> None:
    model, ce, mse = extend(built(two_heads)), extend(nn.CrossEntropyLoss()), extend(nn.MSELoss())
    with backpack(SqrtGGNExact()):
        first, second = model(x)
        (ce(first, labels) + mse(second, values)).backward()
    assert model.a.weight.sqrt_ggn_exact.shape == (3 + 3, 5, 6, 4)
    assert model.classes.bias.sqrt_ggn_exact.shape == (3, 5, 3)


# --- wiring drawn at random -------------------------------------------------------------------------------------------


def drawn_network(seed: int, width: int = 4) -> nn.Module:
    """A random acyclic graph of Linear layers and activations with skips, joins and one possible reuse in parallel."""
    generator = torch.Generator().manual_seed(seed)

    def choice(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    steps = [(choice(4), choice(k + 1), choice(k + 1)) for k in range(6)]
    modules: dict[str, nn.Module] = {"act0": nn.Tanh(), "act1": nn.Sigmoid(), "act2": nn.ReLU()}
    modules |= {f"linear{k}": nn.Linear(width, width) for k in range(7)}

    def wire(m: Any, x: Tensor) -> Tensor:
        h = [m.linear6(x)]
        for k, (kind, first, second) in enumerate(steps):
            a, b = h[first], h[second]
            if kind == 0:
                h.append(getattr(m, f"linear{k}")(a))
            elif kind == 1:
                h.append(getattr(m, f"act{k % 3}")(a))
            elif kind == 2:
                h.append(a - 0.5 * b)
            else:
                h.append(getattr(m, f"act{k % 3}")(getattr(m, f"linear{k}")(a)) + b)
        return torch.stack(h[-3:], 2).mean(2)[:, :3]

    return Wired(wire, **modules)


@pytest.mark.parametrize("seed", range(12))
def test_drawn_graphs(seed: int, agree: Agree) -> None:
    def build() -> nn.Module:
        model = drawn_network(seed)
        used: set[nn.Module] = set()
        handles = [
            m.register_forward_hook(lambda m, args, out: used.add(m))
            for m in model.modules()
            if isinstance(m, nn.Linear)
        ]
        f = model(torch.zeros(2, 4))
        for handle in handles:
            handle.remove()
        reached = torch.autograd.grad(f.sum(), list(model.parameters()), allow_unused=True)
        for p, gradient in zip(model.parameters(), reached, strict=True):
            p.requires_grad_(gradient is not None)
        return model

    loss = extend(nn.CrossEntropyLoss())
    check(agree, build, lambda f: loss(f, labels), [contributions(nn.CrossEntropyLoss(), labels)], EXACT)
