"""The calculus on expressions that are no layers of ours, against torch autograd and brute-force evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import sympy
import torch
from sympy import Rational, exp, log, sqrt, tanh

from satchel_gen.calculus.derive import Constant, Statement, jacobian, total_derivative, total_jacobian, vjp
from satchel_gen.calculus.evaluate import evaluate, evaluate_statements
from satchel_gen.calculus.kronecker import kronecker
from satchel_gen.calculus.terms import CalculusError, Term, contract, terms
from satchel_gen.notation import Access, Equal, Fresh, LogSumExp, Sum, extent, indices, sigmoid, softplus, tensors

n, i, j, k, m = indices("n i j k m")
x, y, W, U, mu, var, s, z, t = tensors("x y W U mu var s z t")
EXTENTS = {"n": 3, "i": 4, "j": 5, "k": 2, "m": 6}


@dataclass(frozen=True)
class Case:
    """Statements with the torch function that they spell."""

    name: str
    statements: tuple[Statement, ...]
    shapes: dict[str, tuple[int, ...]]
    torch: object
    wrt: sympy.Indexed


def softmax(x):
    return torch.softmax(x, 1)


CASES = [
    Case("bilinear", (Statement(y[n, k], Sum(x[n, i] * W[k, i, j] * x[n, j], i, j)),), {"x": (3, 4), "W": (2, 4, 4)},
         lambda x, W: torch.einsum("ni,kij,nj->nk", x, W, x), x[n, i]),
    Case("bilinear in its weight", (Statement(y[n, k], Sum(x[n, i] * W[k, i, j] * x[n, j], i, j)),), {"x": (3, 4), "W": (2, 4, 4)},
         lambda x, W: torch.einsum("ni,kij,nj->nk", x, W, x), W[k, i, j]),
    Case("softmax", (Statement(z[n], LogSumExp(x[n, i], i)), Statement(y[n, i], exp(x[n, i] - z[n]))), {"x": (3, 4)}, softmax, x[n, i]),
    Case("layer norm", (
        Statement(mu[n], Sum(x[n, i], i) / extent(i)),
        Statement(var[n], Sum((x[n, i] - mu[n]) ** 2, i) / extent(i)),
        Statement(y[n, i], (x[n, i] - mu[n]) / sqrt(var[n] + Rational(1, 10))),
    ), {"x": (3, 4)}, lambda x: torch.nn.functional.layer_norm(x, (4,), eps=0.1), x[n, i]),
    Case("variance, centred twice", (
        Constant(s[n], Sum(x[n, i], i) / extent(i)),
        Statement(t[n, i], x[n, i] - s[n]),
        Statement(mu[n], Sum(t[n, i], i) / extent(i)),
        Statement(y[n], Sum((t[n, i] - mu[n]) ** 2, i)),
    ), {"x": (3, 4)}, lambda x: 4 * x.var(1, correction=0), x[n, i]),
    Case("two layers", (
        Statement(z[n, j], Sum(x[n, i] * W[j, i], i)),
        Statement(t[n, j], tanh(z[n, j]) * sigmoid(z[n, j])),
        Statement(y[n, k], Sum(U[k, j] * softplus(t[n, j]), j) + log(2)),
    ), {"x": (3, 4), "W": (5, 4), "U": (2, 5)},
         lambda x, W, U: torch.nn.functional.softplus(torch.tanh(x @ W.T) * torch.sigmoid(x @ W.T)) @ U.T + np.log(2), W[j, i]),
    Case("attention scores", (
        Statement(s[n, i, j], Sum(x[n, i, k] * x[n, j, k], k)),
        Statement(z[n, i], LogSumExp(s[n, i, j], j)),
        Statement(y[n, i, k], Sum(exp(s[n, i, j] - z[n, i]) * x[n, j, k], j)),
    ), {"x": (3, 4, 2)}, lambda x: torch.softmax(x @ x.mT, -1) @ x, x[n, i, k]),
]  # fmt: skip


def values(case: Case) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape) for name, shape in case.shapes.items()}


def sizes(case: Case) -> dict[str, int]:
    found = dict(EXTENTS)
    if case.name == "attention scores":
        found |= {"i": 4, "j": 4}
    if case.name.startswith("bilinear"):
        found |= {"j": 4}
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_statements_mean_what_torch_computes(case):
    tensors = values(case)
    known = evaluate_statements(case.statements, tensors, sizes(case))
    expected = case.torch(*(torch.tensor(v) for v in tensors.values()))
    np.testing.assert_allclose(known["y"], expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reverse_accumulation_is_autograd(case):
    tensors, extents = values(case), sizes(case)
    known = tensors | evaluate_statements(case.statements, tensors, extents)
    rng = np.random.default_rng(2)
    cotangent = rng.normal(size=known["y"].shape)
    known["c"] = cotangent
    (c,) = (sympy.IndexedBase("c"),)
    for head, parts in vjp(case.statements, case.wrt, c[case.statements[-1].axes]):
        known[str(head.base)] = evaluate(parts, head.indices, known, extents)
    name = str(case.wrt.base)
    arguments = {key: torch.tensor(v, requires_grad=key == name) for key, v in tensors.items()}
    (expected,) = torch.autograd.grad(case.torch(*arguments.values()), arguments[name], torch.tensor(cotangent))
    np.testing.assert_allclose(known[f"bar_{name}"], expected.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_total_jacobian_is_autograd(case):
    tensors, extents = values(case), sizes(case)
    known = tensors | evaluate_statements(case.statements, tensors, extents)
    fresh, last = Fresh(), case.statements[-1]
    at, wrt = fresh.all(last.axes), fresh.all(case.wrt.indices)
    parts = total_jacobian(last, str(case.wrt.base), at, wrt, case.statements, fresh)
    found = evaluate(parts, (*at, *wrt), known, extents)
    name = str(case.wrt.base)
    order = list(tensors)
    inputs = [torch.tensor(v) for v in tensors.values()]

    def along(value):
        return case.torch(*(value if key == name else inputs[order.index(key)] for key in order))

    expected = torch.autograd.functional.jacobian(along, inputs[order.index(name)])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_second_derivatives_are_autograds(case):
    """∂²φ/∂u∂u′ of φ = Σ c · y, through every named intermediate: what residuals are made of."""
    tensors, extents = values(case), sizes(case)
    known = tensors | evaluate_statements(case.statements, tensors, extents)
    known["c"] = np.random.default_rng(3).normal(size=known["y"].shape)
    fresh, last = Fresh(), case.statements[-1]
    at, first, second = fresh.all(last.axes), fresh.all(case.wrt.indices), fresh.all(case.wrt.indices)
    name = str(case.wrt.base)
    weight = Term(sympy.IndexedBase("c")[at])
    gradient = [
        contract((weight * part).summed(at)) for part in total_jacobian(last, name, at, first, case.statements, fresh)
    ]
    parts = [d for part in gradient for d in total_derivative(part, name, second, case.statements, fresh)]
    found = evaluate(parts, (*first, *second), known, extents)
    order, inputs = list(tensors), [torch.tensor(v) for v in tensors.values()]

    def phi(value):
        y = case.torch(*(value if key == name else inputs[order.index(key)] for key in order))
        return (torch.tensor(known["c"]) * y).sum()

    expected = torch.autograd.functional.hessian(phi, inputs[order.index(name)])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9, atol=1e-10)


def test_a_primed_copy_does_not_capture_the_definitions_own_indices():
    """Differentiating Σ_i x_i x_j by the definition's own names would confuse the summed i with the asked one."""
    statement = Statement(y[n, j], Sum(x[n, i], i) * x[n, j])
    parts = jacobian(statement, "x", (n, j), (n, i), Fresh())
    tensors = {"x": np.random.default_rng(0).normal(size=(3, 4))}
    found = evaluate(parts, (n, j, i), tensors, {"n": 3, "i": 4, "j": 4})
    total = tensors["x"].sum(1)
    expected = total[:, None, None] * np.eye(4) + tensors["x"][:, :, None] * np.ones(4)
    np.testing.assert_allclose(found, expected)


def test_contraction_solves_deltas_and_keeps_the_structure():
    a, b = indices("a b")
    solved = contract(Term(x[a, k], frozenset({a}), ((a, b),)))
    assert solved == Term(x[b, k])
    kept = contract(Term(x[n, k], frozenset(), ((a, b),)))
    assert kept.deltas == ((a, b),)


def test_the_square_of_a_product_without_sums_separates():
    assert Term(x[n, i] * W[k, i]).squared() == Term(x[n, i] ** 2 * W[k, i] ** 2)
    assert Term(x[n, i] * W[k, i], frozenset({i})).squared().square is not None


@pytest.mark.parametrize(
    "factor,deltas,axes,groups",
    [
        (x[n, k, i], True, (m, i), ((k,), (), (m,), (i,))),
        (x[n, k, j, i], True, (m, i), ((k,), (m,), (), (i,))),
        (sympy.Integer(1), True, (m, i), ((k,), (), (m,), (i,))),
        (x[n, k, j], True, (m,), None),
        (x[n, k, i], False, (m, i), None),
    ],
    ids=["dense", "blocks: the delta's index is read", "bias", "scale: nothing but blocks", "no delta"],
)
def test_kronecker_structure_is_found(factor, deltas, axes, groups):
    """∂y[n, k, j] / ∂θ[axes] with δ(j, m): shared, block, outer and inner axes."""
    found = kronecker([Term(factor, frozenset(), ((j, m),) if deltas else ())], (k, j), axes, n)
    assert groups == (found and (found.shared, found.block, found.outer, found.inner))


def test_a_sum_inside_a_function_must_be_named():
    with pytest.raises(CalculusError, match="named intermediate"):
        terms(log(Sum(exp(x[n, i]), i)))


def test_an_affine_access_leaves_a_delta_of_its_position():
    (term,) = jacobian(Statement(y[n, i], x[n, Access(i, 2 * i, i)]), "x", (n, i), (n, j), Fresh())
    assert term.deltas == ((2 * i, j),) or term.deltas == ((j, 2 * i),)


def test_equal_is_a_one_hot_mask():
    labels = np.array([1, 0, 1])
    found = evaluate([Term(Equal(k, t[n]))], (n, k), {"t": labels}, EXTENTS)
    np.testing.assert_array_equal(found, np.eye(2)[labels])
