"""What is derived from a loss: gradient, Hessian, exact factor; losses that are not ours among them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sympy import Integer, Rational, cosh, exp

from satchel_gen.calculus.evaluate import evaluate, evaluate_statements
from satchel_gen.calculus.likelihood import likelihood
from satchel_gen.calculus.terms import CalculusError, Term
from satchel_gen.definitions import (
    Categorical,
    Equal,
    LogSumExp,
    Loss,
    Normal,
    Statement,
    Sum,
    extent,
    indices,
    load,
    tensors,
)

n, k, j = indices("n k j")
f, y, lse, loss = tensors("input target lse loss")
UNIT = Normal(mean=f[n, j], variance=Integer(1))


def simple(value, **details) -> Loss:
    return Loss(
        "Own", input=f[n, j], target=y[n, j], statements=(Statement(loss[n, j], value),), distribution=UNIT, **details
    )


DIAGONAL = {
    "quartic": ((f[n, j] - y[n, j]) ** 4, lambda f, y: (f - y) ** 4),
    "poisson": (exp(f[n, j]) - y[n, j] * f[n, j], lambda f, y: f.exp() - y * f),
    "half square": ((f[n, j] - y[n, j]) ** 2 * Rational(1, 2), lambda f, y: (f - y) ** 2 / 2),
    "hyperbolic": (cosh(f[n, j] - y[n, j]), lambda f, y: torch.cosh(f - y)),
}


@pytest.mark.parametrize("name", DIAGONAL)
def test_a_diagonal_hessian_gives_its_square_root(name):
    value, plain = DIAGONAL[name]
    found = likelihood(simple(value))
    rng = np.random.default_rng(0)
    tensors = {"input": rng.normal(size=(2, 3)), "target": rng.normal(size=(2, 3))}
    extents = {"n": 2, "j": 3}
    factor = evaluate([Term(found.exact_factor)], (*found.columns, n, j), tensors, extents)
    target = torch.tensor(tensors["target"])
    hessian = torch.autograd.functional.hessian(lambda f: plain(f, target).sum(), torch.tensor(tensors["input"]))
    for sample in range(2):
        np.testing.assert_allclose(factor[:, sample].T @ factor[:, sample], hessian[sample, :, sample], atol=1e-12)


@pytest.mark.parametrize("definition", load().losses, ids=lambda definition: definition.name)
def test_gradient_and_hessian_of_every_loss(definition):
    found = likelihood(definition)
    module = getattr(torch.nn, definition.name)(reduction="sum")
    axes = definition.input.indices
    extents = {axis.name: 2 + position for position, axis in enumerate(axes)}
    rng = np.random.default_rng(1)
    shape, target_shape = ([extents[i.name] for i in read.indices] for read in (definition.input, definition.target))
    target = rng.integers(0, shape[1], target_shape) if definition.domain else rng.normal(size=target_shape)
    tensors = {"input": rng.normal(size=shape), "target": target}
    tensors |= evaluate_statements(definition.statements, tensors, extents)
    x = torch.tensor(tensors["input"])
    gradient = evaluate([Term(found.gradient)], axes, tensors, extents)
    plain = torch.autograd.functional.jacobian(lambda f: module(f, torch.tensor(target)), x)
    np.testing.assert_allclose(gradient, plain.numpy(), atol=1e-12)


def test_a_coupled_hessian_of_unknown_structure_is_refused():
    """(Σ_k f_k)² has the Hessian 2 · 1 1ᵀ, neither diagonal nor diag(p) − p pᵀ."""
    with pytest.raises(CalculusError, match=r"test_likelihood.py:\d+: Own: no exact factor"):
        likelihood(
            Loss(
                "Own", input=f[n, k], target=y[n], statements=(Statement(lse[n], Sum(f[n, k], k)), Statement(loss[n], lse[n] ** 2)),
                distribution=Normal(mean=f[n, k], variance=Integer(1)),
            )
        )  # fmt: skip


def test_a_factor_that_enumerates_outcomes_would_be_wrong_here_and_is_refused():
    """Temperature 2 on half of the classes: the Hessian is not diag(p) − p pᵀ, though its Fisher has the same form."""
    with pytest.raises(CalculusError, match="no exact factor"):
        likelihood(
            Loss(
                "Own", input=f[n, k], target=y[n],
                statements=(
                    Statement(lse[n], LogSumExp(2 * f[n, k] + k * f[n, k], k)),
                    Statement(loss[n], lse[n] - Sum(Equal(k, y[n]) * f[n, k], k)),
                ),
                distribution=Categorical(probabilities=exp(2 * f[n, k] + k * f[n, k] - lse[n]), over=k),
                domain=(Integer(0), extent(k)),
            )
        )  # fmt: skip
