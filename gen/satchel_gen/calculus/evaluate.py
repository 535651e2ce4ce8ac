"""Brute-force evaluation of terms in NumPy: the definition of what a formula means, used to check what is derived."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray

from ..notation import Equal, Extent, Index, LogSumExp, Option, base_name, reads
from .derive import Statement
from .terms import Term, terms

Array = NDArray[Any]
Axes = tuple[Index, ...]

_FUNCTIONS = {
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "softplus": lambda z: np.logaddexp(0, z),
    "erf": np.vectorize(math.erf),
}


def evaluate(parts: Sequence[Term], axes: Axes, tensors: Mapping[str, Array], extents: Mapping[str, int]) -> Array:
    """Σ of terms over a grid of all their indices."""
    total = np.zeros([_extent(i, extents) for i in axes])
    for term in parts:
        total = total + _evaluate(term, axes, tensors, extents)
    return total


def evaluate_statements(
    statements: Sequence[Statement], tensors: Mapping[str, Array], extents: Mapping[str, int]
) -> dict[str, Array]:
    """Every statement's target, in order."""
    known = dict(tensors)
    for statement in statements:
        if isinstance(statement.value, LogSumExp):
            body = evaluate([Term(statement.value.body)], (*statement.axes, *statement.value.over), known, extents)
            known[statement.name] = np.logaddexp.reduce(body, axis=-1)
        else:
            known[statement.name] = evaluate(terms(statement.value), statement.axes, known, extents)
    return {s.name: known[s.name] for s in statements}


def moves_the_last(constant: Statement, statements: Sequence[Statement]) -> bool:
    """Whether the last of the statements depends on another's value, in float64 on random numbers."""
    rng = np.random.default_rng(0)
    defined = {s.name for s in statements}
    values = [s.value for s in statements]
    accessed = {str(r.base): [3] * len(r.indices) for value in values for r in reads(value)}
    extents = {base_name(i): 3 for value in (*values, constant.target) for i in value.atoms(Index)}
    tensors = {name: rng.uniform(0.5, 1.5, shape) for name, shape in accessed.items() if name not in defined}
    tensors |= {o.name: np.asarray(0.5) for value in values for o in value.atoms(Option)}
    known = tensors | evaluate_statements(statements, tensors, extents)
    after = statements[statements.index(constant) + 1 :]
    moved = evaluate_statements(after, known | {constant.name: known[constant.name] + 1}, extents)
    name = statements[-1].name
    return not np.allclose(moved[name], known[name], rtol=1e-9, atol=1e-9)


def _extent(index: Index, extents: Mapping[str, int]) -> int:
    name = index.name.split("#")[0]
    return extents[name] if name in extents else extents[base_name(index)]


def _evaluate(term: Term, axes: Axes, tensors: Mapping[str, Array], extents: Mapping[str, int]) -> Array:
    sums = tuple(sorted(term.sums, key=str))
    grid_axes = (*axes, *sums)
    shape = [_extent(i, extents) for i in grid_axes]
    grid = dict(zip(grid_axes, np.indices(shape, sparse=True), strict=True))
    value = np.broadcast_to(_pointwise(term.factor, grid, tensors, extents), shape).astype(float)
    for a, b in term.deltas:
        value = value * (grid[a] == grid[b])
    if term.square is not None:
        value = value * _evaluate(term.square, grid_axes, tensors, extents) ** 2
    total = value.sum(tuple(range(len(axes), len(grid_axes)))) if sums else value
    return total if term.centred is None else total - total.mean(axes.index(term.centred), keepdims=True)


def _pointwise(
    expr: sympy.Expr, grid: Mapping[Index, Array], tensors: Mapping[str, Array], extents: Mapping[str, int]
) -> Array:
    accessed = reads(expr)
    slots = {read: sympy.Symbol(f"read{k}", real=True) for k, read in enumerate(accessed)}
    values = {slots[r]: tensors[str(r.base)][tuple(grid[i] for i in r.indices)] for r in accessed}
    expr = expr.xreplace({e: sympy.Integer(_extent(e.args[0], extents)) for e in expr.atoms(Extent)})
    expr = expr.xreplace({o: sympy.sympify(tensors[o.name].item()) for o in expr.atoms(Option)})
    masks = {}
    for k, equal in enumerate(sorted(expr.atoms(Equal), key=str)):
        left, right = (grid[a] if isinstance(a, Index) else values.get(slots.get(a), a) for a in equal.args)
        masks[sympy.Symbol(f"mask{k}")] = np.equal(left, right).astype(float)
        expr = expr.xreplace({equal: sympy.Symbol(f"mask{k}")})
    expr = expr.xreplace(slots)
    names = [*values, *masks]
    function = sympy.lambdify(names, expr, modules=[_FUNCTIONS, "numpy"])
    return np.asarray(function(*values.values(), *masks.values()))
