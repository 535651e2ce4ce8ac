"""What follows from a loss: gradient, Hessian, an exact factor S with S Sᵀ = ∇²ℓ, and the Monte-Carlo factor.

The exact factor is found by the Hessian's structure at the data. (Enumerating the outcomes of the distribution gives the
Fisher instead, which is ∇²ℓ only where the Hessian does not depend on the target.) Every factor is checked numerically when
it is derived; a Hessian of another structure, or a factor that fails the check, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sympy
from sympy import Expr, IndexedBase

from ..definitions.model import Loss
from ..notation import Equal, Extent, Fresh, Index
from .derive import total_derivative, total_jacobian
from .evaluate import evaluate, evaluate_statements
from .terms import CalculusError, Term, contract

Axes = tuple[Index, ...]


@dataclass(frozen=True)
class Likelihood:
    """Derived quantities of a loss with unit weight; all are elementwise in their axes and intermediates.

    gradient[n, *input]; exact_factor[*columns, n, *input]; mc_factor[m, n, *input] reads the drawn targets as `sampled`.
    """

    loss: Loss
    gradient: Expr
    hessian: tuple[Term, ...]
    columns: Axes
    exact_factor: Expr
    mc_factor: Expr
    draws: Index


def likelihood(loss: Loss) -> Likelihood:
    """Derive all that curvature needs from the loss's terms."""
    fresh = Fresh()
    name, axes = str(loss.input.base), tuple(loss.input.indices)
    twins = tuple(Index(f"{i.name}2", i.many) for i in axes[1:])
    gradient = _gradient(loss, axes, fresh)
    hessian = tuple(
        derivative
        for part in gradient
        for derivative in total_derivative(part, name, (axes[0], *twins), loss.statements, fresh)
    )
    hessian = _collected(hessian)
    columns, factor = _exact_factor(loss, hessian, axes[1:], twins)
    value = sympy.Add(*(part.factor for part in gradient))
    m = Index("m")
    sampled = IndexedBase("sampled")[(m, *loss.target.indices)]
    drawn = value.xreplace({loss.target: sampled}) / sympy.sqrt(Extent(m))
    found = Likelihood(loss, value, hessian, columns, factor, drawn, m)
    _verify(found, twins)
    return found


def _gradient(loss: Loss, axes: Axes, fresh: Fresh) -> list[Term]:
    """∂ Σℓ / ∂f, through the loss's intermediates."""
    last = loss.statements[-1]
    at = fresh.all(last.axes)
    parts = total_jacobian(last, str(loss.input.base), at, axes, loss.statements, fresh)
    parts = [contract(part.summed(at)) for part in parts]
    for part in parts:
        if part.sums or part.deltas:
            raise CalculusError(
                f"{loss.source}: {loss.name}: the gradient {part} is not elementwise after intermediates"
            )
    return parts


def _collected(parts: tuple[Term, ...]) -> tuple[Term, ...]:
    """Terms of equal structure as one."""
    groups: dict[tuple[frozenset[Index], tuple[tuple[Index, Index], ...]], Expr] = {}
    for part in parts:
        part = contract(part)
        rename = {b: a for a, b in part.deltas}  # one name on both sides of a delta
        key = (part.sums, tuple(sorted(part.deltas, key=str)))
        groups[key] = groups.get(key, sympy.Integer(0)) + part.factor.xreplace(rename)
    return tuple(Term(sympy.expand(f) if f.is_polynomial() else f, s, d) for (s, d), f in groups.items() if f != 0)


def _exact_factor(loss: Loss, hessian: tuple[Term, ...], axes: Axes, twins: Axes) -> tuple[Axes, Expr]:
    """S by structure: √h · δ for a diagonal Hessian; √p_v (δ_vk − p_k) for diag(p) − p pᵀ; blocks over other axes."""
    partner = dict(zip(axes, twins, strict=True))
    diagonal = [t for t in hessian if len(t.deltas) == len(axes)]
    coupled = [t for t in hessian if len(t.deltas) < len(axes)]
    if len(diagonal) != 1 or len(coupled) > 1 or any(t.sums for t in hessian):
        raise _refusal(loss, hessian)
    height = diagonal[0].factor
    if not coupled:
        return twins, sympy.sqrt(height) * sympy.Mul(*(Equal(partner[i], i) for i in axes))
    bound = {i for delta in coupled[0].deltas for i in delta}
    mixing = [i for i in axes if i not in bound]
    if len(mixing) != 1:
        raise _refusal(loss, hessian)
    (k,) = mixing
    column = partner[k]
    if sympy.simplify(coupled[0].factor + height * height.xreplace({k: column})) != 0:
        raise _refusal(loss, hessian)
    blocks = sympy.Mul(*(Equal(partner[i], i) for i in axes if i != k))
    return twins, sympy.sqrt(height.xreplace({k: column})) * (Equal(column, k) - height) * blocks


def _refusal(loss: Loss, hessian: tuple[Term, ...]) -> CalculusError:
    shown = " + ".join(map(str, hessian))
    return CalculusError(f"{loss.source}: {loss.name}: no exact factor is known for the Hessian {shown}")


def _verify(found: Likelihood, twins: Axes) -> None:
    """S Sᵀ = ∇²ℓ at random inputs and targets, to rounding."""
    loss, rng = found.loss, np.random.default_rng(0)
    axes, n = tuple(loss.input.indices), loss.batch
    extents = {i.name: 2 + k for k, i in enumerate(axes)} | {t.name: 3 + k for k, t in enumerate(twins)}
    shape = [extents[i.name] for i in axes]
    target_shape = [extents[i.name] for i in loss.target.indices]
    upper = extents[loss.domain[1].args[0].name] if loss.domain else 0
    target = rng.integers(0, upper, target_shape) if loss.domain else rng.normal(size=target_shape)
    tensors = {str(loss.input.base): rng.normal(size=shape), str(loss.target.base): target}
    tensors |= evaluate_statements(loss.statements, tensors, extents)
    factor = evaluate([Term(found.exact_factor)], (*found.columns, *axes), tensors, extents)
    hessian = evaluate(found.hessian, (n, *axes[1:], *twins), tensors, extents)
    width = int(np.prod(shape[1:]))
    square = factor.reshape(-1, shape[0], width)
    product = np.einsum("vna,vnb->nab", square, square)
    if not np.allclose(product, hessian.reshape(shape[0], width, width), rtol=1e-9, atol=1e-9):
        raise CalculusError(
            f"{loss.source}: {loss.name}: the factor {found.exact_factor} does not square to the Hessian"
        )
