"""What is derived from a loss: gradient, Hessian, exact factor; losses that are not ours among them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sympy import Integer, Rational, cosh, exp

from satchel_gen.calculus.evaluate import evaluate, evaluate_statements
from satchel_gen.calculus.likelihood import likelihood, options, sample
from satchel_gen.calculus.terms import CalculusError, Term
from satchel_gen.definitions import (
    Categorical,
    Classes,
    Equal,
    Index,
    LogSumExp,
    Loss,
    Normal,
    Statement,
    Sum,
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
    factor = evaluate([Term(found.exact.value)], (*found.exact.columns, n, j), tensors, extents)
    target = torch.tensor(tensors["target"])
    hessian = torch.autograd.functional.hessian(lambda f: plain(f, target).sum(), torch.tensor(tensors["input"]))
    for one in range(2):
        np.testing.assert_allclose(factor[:, one].T @ factor[:, one], hessian[one, :, one], atol=1e-12)


LOSSES = [(definition, example) for definition in load().losses for example in definition.examples]


@pytest.mark.parametrize("definition,example", LOSSES, ids=[f"{d.name}-{d.examples.index(e)}" for d, e in LOSSES])
def test_gradient_and_hessian_of_every_loss(definition, example):
    """At a random input, with the options of the example, against torch's own loss in float64."""
    found = likelihood(definition)
    drawn, extents = sample(definition, {"k2": 3, "j2": 3, "r2": 4}, seed=1)
    names = {str(t.base) for t in definition.operands}
    given = {k: v for k, v in example.arguments.items() if k not in ("reduction", *names)}
    module = getattr(torch.nn, definition.module.rpartition(".")[2])(reduction="sum", **given)
    for name in names - set(definition.arguments):  # weights over all that they may vary over, absent or not
        setattr(module, name, torch.tensor(drawn[name]))
    for option in options(definition):
        drawn[option.name] = np.asarray(getattr(module, option.attribute))
    drawn |= evaluate_statements(definition.statements, drawn, extents)
    axes, x = definition.input.indices, torch.tensor(drawn["input"])
    more = [torch.tensor(drawn["target"]), *(torch.tensor(drawn[name]) for name in definition.arguments)]

    def total(f):
        return module(f, *more)

    gradient = evaluate([Term(found.gradient)], axes, drawn, extents)
    np.testing.assert_allclose(gradient, torch.autograd.functional.jacobian(total, x).numpy(), atol=1e-12, rtol=1e-9)
    twins = tuple(Index(f"{i.name}2", i.many) for i in axes[1:])
    hessian = evaluate(found.hessian, (*axes, *twins), drawn, extents)
    dense = torch.autograd.functional.hessian(total, x).numpy()
    for n in range(len(x)):
        np.testing.assert_allclose(hessian[n], dense[n][(..., n, *[slice(None)] * len(twins))], atol=1e-12, rtol=1e-9)


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
                distribution=Categorical(2 * f[n, k] + k * f[n, k] - lse[n], over=k),
                domain=Classes(k, Integer(-100)),
            )
        )  # fmt: skip
