"""What follows from a loss: gradient, Hessian, an exact factor S with S Sᵀ = ∇²ℓ, and the Monte-Carlo factor.

The exact factor is found by the Hessian's structure at the data. (Enumerating the outcomes of the distribution gives the
Fisher instead, which is ∇²ℓ only where the Hessian does not depend on the target.) Every factor is checked numerically when
it is derived; a Hessian of another structure, or a factor that fails the check, is refused.

The Monte-Carlo factor is √weight times the score −∇ log p(ŷ | f) at drawn outcomes: the mean of its squares estimates the Fisher,
weighted as the loss weights the data.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray
from sympy import Expr, Indexed, IndexedBase

from ..definitions.distributions import Distribution
from ..definitions.model import Classes, Loss
from ..notation import Equal, Fresh, Index, IndexSum, Option, index_atoms, sigmoid
from .derive import Statement, total_derivative, total_jacobian
from .evaluate import evaluate, evaluate_statements
from .outcomes import outcomes
from .terms import CalculusError, Term, contract

Axes = tuple[Index, ...]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ExactFactor:
    """S[*columns, n, *input], and the `height` that it takes a square root of.

    null[n, *input] ≥ 0: a unit vector over the axis `mixed` that S maps to zero, Σ_k S[k, …] null[…, k, …] = 0; None where
    no such vector is known. The columns of that axis come first.
    """

    columns: Axes
    value: Expr
    height: Expr
    mixed: Index | None = None
    null: Expr | None = None


@dataclass(frozen=True)
class Likelihood:
    """Derived quantities of a loss; all are elementwise in their axes and intermediates.

    gradient[n, *input]; exact_factor[*columns, n, *input], of no columns where the Hessian is zero; mc_factor[m, n, *input]
    reads the drawn outcomes as `sampled`, and is None where there is no distribution. The factors are real where the exact
    factor's height and the loss's weight are not negative. `fisher` says whether what the Monte-Carlo factor estimates is ∇²ℓ.
    """

    loss: Loss
    gradient: Expr
    hessian: tuple[Term, ...]
    exact: ExactFactor
    mc_factor: Expr | None
    draws: Index
    fisher: bool


def likelihood(loss: Loss) -> Likelihood:
    """Derive all that curvature needs from the loss's terms."""
    fresh, draws = Fresh(), Index("m")
    axes = tuple(loss.input.indices)
    twins = tuple(Index(f"{i.name}2", i.many) for i in axes[1:])
    gradient = _gradient(loss, loss.statements, fresh)
    derivatives = (
        derivative
        for part in gradient
        for derivative in total_derivative(part, str(loss.input.base), (axes[0], *twins), loss.statements, fresh)
    )
    hessian = _collected(derivatives)
    exact = _exact_factor(loss, hessian, axes[1:], twins)
    mc_factor = _mc_factor(loss, draws, fresh)
    value = sympy.Add(*(part.factor for part in gradient))
    found = Likelihood(loss, value, hessian, exact, mc_factor, draws, False)
    tensors, extents = sample(loss, {t.name: 3 + k for k, t in enumerate(twins)})
    _verify(found, twins, tensors, extents)
    return replace(found, fisher=_is_fisher(found, twins, tensors, extents))


def _gradient(loss: Loss, statements: Sequence[Statement], fresh: Fresh, outcome: Indexed | None = None) -> list[Term]:
    """∂ Σℓ / ∂f, ℓ the last statement, through its intermediates. An `outcome` is one of the classes that are summed over."""
    last = statements[-1]
    at = fresh.all(last.axes)
    parts = total_jacobian(last, str(loss.input.base), at, tuple(loss.input.indices), statements, fresh)
    parts = [_of_one_class(contract(part.summed(at)), outcome) for part in parts]
    for part in parts:
        if part.sums or part.deltas:
            raise CalculusError(
                f"{loss.source}: {loss.name}: the gradient {part} is not elementwise after intermediates"
            )
    return [Term(_stable(sympy.factor_terms(part.factor))) for part in parts]


def _of_one_class(term: Term, outcome: Indexed | None) -> Term:
    """Σ_k [k = ŷ] c = c."""
    for index in term.sums:
        rest = term.factor.xreplace({Equal(index, outcome): sympy.Integer(1)}) if outcome is not None else term.factor
        if rest != term.factor and index not in index_atoms(rest):
            return _of_one_class(Term(rest, term.sums - {index}, term.deltas), outcome)
    return term


def _mc_factor(loss: Loss, draws: Index, fresh: Fresh) -> Expr | None:
    """√weight · score(ŷ_m)."""
    if not isinstance(loss.distribution, Distribution):
        return None
    drawn = IndexedBase("sampled")
    outcome = drawn[loss.outcomes]
    nll = Statement(IndexedBase("nll")[loss.outcomes], loss.distribution.nll(outcome))
    score = sympy.Add(*(part.factor for part in _gradient(loss, (*loss.statements[:-1], nll), fresh, outcome)))
    score = score.xreplace({outcome: drawn[(draws, *loss.outcomes)]})
    return _root(loss.weight, loss) * score


def _root(value: Expr, loss: Loss) -> Expr:
    """√value; Σ_k [k = x] is 0 or 1, its own root."""
    sums = [s for s in loss.statements if isinstance(s.value, IndexSum) and isinstance(s.value.body, Equal)]
    masks = {s.target for s in sums if s.value.over == s.value.body.args[:1]}
    return value if value in masks else sympy.sqrt(value)


def _stable(expr: Expr) -> Expr:
    """1 − σ(z) as σ(−z), which keeps its digits."""
    return expr.replace(
        lambda e: e.is_Add and len(e.args) == 2 and e.args[0] == 1 and isinstance(-e.args[1], sigmoid),
        lambda e: sigmoid(e.args[1].args[-1].args[0] * -1),
    )


def _simple(expr: Expr) -> Expr:
    """Common factors once, where no case depends on the values."""
    expr = _stable(expr)
    if expr.has(sympy.Piecewise, Equal):
        return expr
    whole = {function: sympy.Dummy() for function in expr.atoms(sympy.Function)}  # exp(a − b) must not come apart
    return sympy.factor(expr.xreplace(whole)).xreplace({slot: function for function, slot in whole.items()})


def _collected(parts: Any) -> tuple[Term, ...]:
    """Terms of equal structure as one."""
    groups: dict[tuple[frozenset[Index], tuple[tuple[Index, Index], ...]], Expr] = {}
    for part in parts:
        part = contract(part)
        rename = {b: a for a, b in part.deltas}  # one name on both sides of a delta
        key = (part.sums, tuple(sorted(part.deltas, key=str)))
        groups[key] = groups.get(key, sympy.Integer(0)) + part.factor.xreplace(rename)
    return tuple(Term(_simple(f), s, d) for (s, d), f in groups.items() if f != 0)


def _exact_factor(loss: Loss, hessian: tuple[Term, ...], axes: Axes, twins: Axes) -> ExactFactor:
    """S by structure. Blocks over other axes, in which the Hessian is

    h δ_kk': √h δ_kv;  c (p_k δ_kk' − p_k p_k'), c the same for all k: √(c p_v) (δ_kv − p_k), of null vector √p;  0: no columns.
    """
    if not hessian:
        return ExactFactor((), sympy.Integer(0), sympy.Integer(0))
    partner = dict(zip(axes, twins, strict=True))
    diagonal = [t for t in hessian if len(t.deltas) == len(axes)]
    coupled = [t for t in hessian if len(t.deltas) < len(axes)]
    if len(diagonal) != 1 or len(coupled) > 1 or any(t.sums for t in hessian):
        raise _refusal(loss, hessian)
    height = diagonal[0].factor
    if not coupled:
        return ExactFactor(twins, sympy.sqrt(height) * sympy.Mul(*(Equal(partner[i], i) for i in axes)), height)
    bound = {i for delta in coupled[0].deltas for i in delta}
    mixing = [i for i in axes if i not in bound]
    if len(mixing) != 1:
        raise _refusal(loss, hessian)
    (k,) = mixing
    column = partner[k]
    scale = sympy.simplify(-height * height.xreplace({k: column}) / coupled[0].factor)
    if {k, column} & index_atoms(scale):
        raise _refusal(loss, hessian)
    probability = height / scale
    blocks = sympy.Mul(*(Equal(partner[i], i) for i in axes if i != k))
    root = _root(scale, loss) * sympy.sqrt(probability.xreplace({k: column}))
    columns = (column, *(twin for twin in twins if twin != column))
    value = root * (Equal(column, k) - probability) * blocks
    return ExactFactor(columns, value, scale, k, sympy.sqrt(probability))


def _refusal(loss: Loss, hessian: tuple[Term, ...]) -> CalculusError:
    shown = " + ".join(map(str, hessian))
    return CalculusError(f"{loss.source}: {loss.name}: no exact factor is known for the Hessian {shown}")


# --------------------------------------------------------------------------------------------------- numerical checks


def sample(loss: Loss, more: Mapping[str, int] | None = None, seed: int = 0) -> tuple[Arrays, dict[str, int]]:
    """Random input, target, operands and options where the loss says that they lie, with its intermediates; the extents."""
    rng = np.random.default_rng(seed)
    axes = tuple(loss.input.indices)
    extents = {i.name: 2 + k for k, i in enumerate(axes)} | dict(more or {})

    def shape(tensor: Any) -> list[int]:
        return [extents[i.name] for i in tensor.indices]

    target = shape(loss.target)
    tensors = {str(loss.input.base): _drawn(loss.support, shape(loss.input), rng)}
    if isinstance(loss.domain, Classes):
        tensors[str(loss.target.base)] = rng.integers(0, extents[loss.domain.over.name], target)
    else:
        tensors[str(loss.target.base)] = _drawn(loss.domain, target, rng)
    tensors |= {str(t.base): rng.uniform(0.3, 2.0, shape(t)) for t in loss.operands}
    for option in sorted(options(loss), key=str):
        tensors[option.name] = np.asarray(1 if option.is_integer else rng.uniform(0.3, 0.9))
    return tensors | evaluate_statements(loss.statements, tensors, extents), extents


def options(loss: Loss) -> set[Option]:
    """The numbers of the module that the formulas read."""
    drawn = loss.distribution
    parameters = drawn.parameters if isinstance(drawn, Distribution) else ()
    values = (*(s.value for s in loss.statements), *loss.reductions.values(), loss.weight, *parameters)
    ignored = loss.domain.ignored if isinstance(loss.domain, Classes) else sympy.Integer(0)
    return {option for value in (*values, ignored) for option in value.atoms(Option)}


def _drawn(where: sympy.Set, shape: Sequence[int], rng: np.random.Generator) -> NDArray[Any]:
    if isinstance(where, sympy.FiniteSet):
        return rng.choice([float(value) for value in where.args], shape)
    if where.inf.is_finite and where.sup.is_finite:
        return rng.uniform(float(where.inf), float(where.sup), shape)
    return rng.exponential(size=shape) + float(where.inf) if where.inf.is_finite else rng.normal(size=shape)


def _verify(found: Likelihood, twins: Axes, tensors: Arrays, extents: dict[str, int]) -> None:
    """S Sᵀ = ∇²ℓ, and S null = 0 with a unit vector, at random inputs and targets, to rounding."""
    loss, exact = found.loss, found.exact
    axes = tuple(loss.input.indices)
    factor = evaluate([Term(exact.value)], (*exact.columns, *axes), tensors, extents)
    square = factor.reshape(-1, extents[loss.batch.name], _width(loss, extents))
    product = np.einsum("vna,vnb->nab", square, square)
    if not np.allclose(product, _hessian(found, twins, tensors, extents), rtol=1e-9, atol=1e-9):
        raise CalculusError(f"{loss.source}: {loss.name}: the factor {exact.value} does not square to the Hessian")
    if exact.mixed is None or exact.null is None:
        return
    null = evaluate([Term(exact.null)], axes, tensors, extents)
    letters = dict(zip((*exact.columns, *axes), string.ascii_letters, strict=False))
    summed = letters | {exact.mixed: letters[exact.columns[0]]}
    spelled = ["".join(letters[i] for i in (*exact.columns, *axes)), "".join(summed[i] for i in axes)]
    image = np.einsum(f"{','.join(spelled)}->{spelled[0][1:]}", factor, null)
    norm = np.square(null).sum(axes.index(exact.mixed))
    if not (np.allclose(image, 0, atol=1e-9) and np.allclose(norm, 1)):
        raise CalculusError(
            f"{loss.source}: {loss.name}: {exact.null} is no unit vector that {exact.value} maps to zero"
        )


def _is_fisher(found: Likelihood, twins: Axes, tensors: Arrays, extents: dict[str, int]) -> bool:
    """Whether E[s sᵀ] over one element's (one row of classes') outcomes is its block of ∇²ℓ."""
    loss = found.loss
    if found.mc_factor is None or not isinstance(loss.distribution, Distribution):
        return False
    axes, n = tuple(loss.input.indices), extents[loss.batch.name]
    fisher = np.zeros((n, _width(loss, extents), _width(loss, extents)))
    shape = [extents[i.name] for i in loss.outcomes]
    parameters = [evaluate([Term(p)], axes, tensors, extents) for p in loss.distribution.parameters]
    places = [axes.index(i) for i in axes if i not in loss.outcomes]
    for drawn, probability in outcomes(loss.distribution, parameters, places):
        known = tensors | {"sampled": np.broadcast_to(drawn, shape)[None]}
        score = evaluate([Term(found.mc_factor)], (found.draws, *axes), known, {**extents, found.draws.name: 1})
        weighted = score[0] * np.expand_dims(np.sqrt(np.broadcast_to(probability, shape)), tuple(places))
        flat, root = score[0].reshape(n, -1), weighted.reshape(n, -1)
        fisher += np.einsum("na,nb->nab", root, root) if flat.size else 0
    same = np.ones((n, *fisher.shape[1:]), bool)
    rest = [i for i in loss.outcomes if i != loss.batch]
    labels = np.arange(int(np.prod([extents[i.name] for i in rest]))).reshape([extents[i.name] for i in rest])
    grid = np.broadcast_to(np.expand_dims(labels, tuple(p - 1 for p in places)), [extents[i.name] for i in axes[1:]])
    same &= grid.reshape(-1)[:, None] == grid.reshape(-1)[None]
    return np.allclose(fisher * same, _hessian(found, twins, tensors, extents), rtol=1e-6, atol=1e-8)


def _hessian(found: Likelihood, twins: Axes, tensors: Arrays, extents: dict[str, int]) -> NDArray[Any]:
    width = _width(found.loss, extents)
    dense = evaluate(found.hessian, (*found.loss.input.indices, *twins), tensors, extents)
    return dense.reshape(-1, width, width)


def _width(loss: Loss, extents: Mapping[str, int]) -> int:
    return int(np.prod([extents[i.name] for i in loss.input.indices[1:]]))
