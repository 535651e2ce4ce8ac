"""The rules of a layer: every quantity of its input and parameters, each with the programs that can compute it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
from sympy import Expr, Indexed

from ..calculus.instantiate import Formula, Instance
from ..calculus.terms import Term, numerator
from ..definitions import quantities as Q
from ..definitions.model import Layer, Quantity
from ..notation import reads
from .deviations import deviation_variants
from .plan import Axes
from .squares import Variant, variants

#: Tensors that the runtime passes to a rule; all others are operands, taken from the record.
EXPLICIT = ("factor", "sign", "curvature", "rows", "averaged", "delta")


@dataclass(frozen=True)
class LoweredRule:
    """One emitted function: a formula, its arguments with their axes, and its programs (one, or a choice by cost)."""

    name: str
    quantity: str
    formula: Formula
    arguments: dict[str, Axes]
    operands: tuple[str, ...]
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class LoweredLayer:
    layer: Layer
    passes: dict[str, LoweredRule | None]
    parameters: dict[str, dict[str, LoweredRule]]
    elementwise: bool
    mixed: bool

    @property
    def rules(self) -> list[LoweredRule]:
        """Every rule, passes first."""
        found = [rule for rule in self.passes.values() if rule is not None]
        return found + [rule for quantities in self.parameters.values() for rule in quantities.values()]


def lower_layer(layer: Layer) -> LoweredLayer:
    """Derive, simplify and plan every quantity of a layer."""
    on_input = Instance(layer, layer.input)
    passes = {q.name: _lower(layer, on_input, q, "") for q in Q.PASSES}
    parameters: dict[str, dict[str, LoweredRule]] = {}
    for parameter in layer.parameters:
        instance = Instance(layer, parameter)
        name = str(parameter.base)
        wanted: list[Quantity] = list(Q.PULLBACKS)
        if instance.structure is None:
            wanted += Q.BLOCKS
        else:
            wanted += (*Q.OUTPUT_FACTORS, *(Q.INPUT_FACTORS if instance.structure.inner else ()))
        lowered = {q.name: _lower(layer, instance, q, f"{name}_") for q in wanted}
        parameters[name] = {quantity: rule for quantity, rule in lowered.items() if rule is not None}
    vjp = on_input.quantity(Q.VJP, "vjp")
    elementwise = all(not term.sums for term in vjp.terms)
    mixed = any(
        str(layer.input.base) in rule.operands for quantities in parameters.values() for rule in quantities.values()
    )
    return LoweredLayer(layer, passes, parameters, elementwise, mixed)


def _lower(layer: Layer, instance: Instance, quantity: Quantity, prefix: str) -> LoweredRule | None:
    formula = in_output(instance.quantity(quantity, prefix + quantity.name), layer)
    if formula.is_zero:
        return None
    centred = any(term.square is not None and term.square.centred is not None for term in formula.terms)
    programs = deviation_variants(formula) if centred else variants(formula)
    stored: dict[str, Axes] = {}
    for found in (leaf for program in programs for leaf in program.arguments):
        stored.setdefault(found.name, found.stored)
    arguments = {name: stored[name] for name in EXPLICIT if name in stored}
    operands = tuple(sorted(name for name in stored if name not in EXPLICIT))
    arguments |= {name: stored[name] for name in operands}
    return LoweredRule(prefix + quantity.name, quantity.name, formula, arguments, operands, programs)


def in_output(formula: Formula, layer: Layer) -> Formula:
    """An elementwise layer's rules in terms of its output, where that is possible: torch keeps the output anyway.

    Either the layer's own value is put in (σ′ = y (1 − y)), or the slope takes the same value at the output as at the input
    (ReLU: y > 0 where z > 0), which is checked numerically.
    """
    statement = layer.statements[0]
    if len(layer.statements) > 1 or layer.parameters or reads(statement.value) != [layer.input]:
        return formula
    return replace(formula, terms=tuple(_term_in_output(term, layer) for term in formula.terms))


def _term_in_output(term: Term, layer: Layer) -> Term:
    statement, name = layer.statements[0], str(layer.input.base)
    constant, parts = numerator(term.factor)
    rewritten = []
    for part in map(_factored, parts):
        accessed = [r for r in reads(part) if str(r.base) == name]
        candidate = part
        for read in accessed:
            where = dict(zip(layer.input.indices, read.indices, strict=True))
            output = layer.output.xreplace(where)
            candidate = candidate.xreplace({statement.value.xreplace(where): output})
            if candidate.has(read) and _same_at_output(part, read, statement.value.xreplace(where)):
                candidate = part.xreplace({read: output})
        rewritten.append(candidate if not any(str(r.base) == name for r in reads(candidate)) else part)
    return replace(term, factor=constant * sympy.Mul(*rewritten))


def _factored(part: Expr) -> Expr:
    """The shorter of an expression and its factorisation."""
    if not part.is_Add:
        return part
    factored = sympy.factor(part)
    return factored if factored.count_ops() < part.count_ops() else part


_GRID = [sympy.Rational(k, 4) for k in (-400, -40, -12, -9, -4, -3, -2, -1, 0, 1, 2, 3, 4, 9, 12, 40, 400)]


def _same_at_output(slope: Expr, read: Indexed, value: Expr) -> bool:
    """Whether slope(f(z)) = slope(z) on a grid with the usual kinks."""
    z = sympy.Symbol("z", real=True)
    slope, value = slope.xreplace({read: z}), value.xreplace({read: z})
    if slope.atoms(Indexed):
        return False
    return all(
        abs(sympy.N(slope.xreplace({z: sympy.N(value.xreplace({z: at}))}) - slope.xreplace({z: at}))) < 1e-12
        for at in _GRID
    )
