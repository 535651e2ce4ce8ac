"""The rules of a layer: every quantity of its input and parameters, each with the programs that can compute it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
from sympy import Expr, Indexed

from ..calculus.instantiate import Formula, Instance
from ..calculus.terms import Term, numerator, solve
from ..definitions import quantities as Q
from ..definitions.model import Layer, Quantity
from ..notation import Index, IndexSum, LogSumExp, Option, reads, sigmoid, softplus
from .composed import Stage, composed_hessian, composed_vjp, stages_of
from .deviations import deviation_variants
from .plan import Axes, extent_symbol, flops, indices_of, leaves, size
from .squares import Variant, variants

#: Tensors that the runtime passes to a rule; all others are operands, taken from the record.
EXPLICIT = ("factor", "sign", "curvature", "rows", "averaged", "delta", "tangent")
#: Operations for each element that as many passes over memory cost less than a call of a node.
_FEW = 6


@dataclass(frozen=True)
class LoweredRule:
    """One emitted function: a formula, its arguments with their axes, and its programs (one, or a choice by cost)."""

    name: str
    quantity: str
    formula: Formula
    arguments: dict[str, Axes]
    operands: tuple[str, ...]
    variants: tuple[Variant, ...]
    components: tuple[Option, ...] = ()  # the numbers of the module that it reads
    stages: tuple[Stage, ...] = ()
    lead: int | None = None  # axes in front of the parameter's own, in what belongs to a parameter
    shapes: Mapping[str, Axes] = field(default_factory=dict)  # of tensors that it does not read

    @property
    def on_parameter(self) -> bool:
        """Whether the rule belongs to a parameter; its stages are then the layer's own intermediates."""
        return self.name != self.quantity

    @property
    def numbers(self) -> tuple[str, ...]:
        return (*self.shapes, *dict.fromkeys(option.attribute for option in self.components))

    @property
    def composed(self) -> bool:
        """Whether it computes intermediates of its own, or the slope of a curve in many operations."""
        if self.stages:
            return not self.on_parameter
        values = {"input", "output"} & set(self.operands)
        return self.quantity == "vjp" and bool(values) and any(t.factor.count_ops() > _FEW for t in self.formula.terms)

    @property
    def heavy(self) -> bool:
        """Whether it takes many operations for each element that it reads, or writes many: at extents of 64, and of 1 of starred axes."""
        trees = [stage.tree for stage in self.stages if stage.tree is not None]
        trees += [tree for variant in self.variants for tree in variant.trees]
        work = sum(map(flops, trees), size(self.formula.axes))
        given = sum((size(axes) for axes in self.arguments.values()), sympy.Integer(0))
        extents = work.free_symbols | given.free_symbols
        stars = [e for e in extents if e in {extent_symbol(i) for tree in trees for i in indices_of(tree) if i.many}]
        sizes = [
            dict.fromkeys(extents, 64) | dict(zip(stars, starred, strict=True))
            for starred in itertools.product((1, 64), repeat=len(stars))
        ]
        return any(work.subs(these) > 16 * given.subs(these) for these in sizes)


@dataclass(frozen=True)
class LoweredLayer:
    layer: Layer
    passes: dict[str, LoweredRule | None]  # by quantity; None: zero, or composed by the engine from the vjp
    parameters: dict[str, dict[str, LoweredRule]]
    elementwise: bool
    mixed: bool
    positional: bool

    @property
    def rules(self) -> list[LoweredRule]:
        """Every rule, passes first."""
        found = [rule for rule in self.passes.values() if rule is not None]
        return found + [rule for quantities in self.parameters.values() for rule in quantities.values()]


def lower_layer(layer: Layer) -> LoweredLayer:
    """Derive, simplify and plan every quantity of a layer."""
    passes = _passes(layer)
    parameters: dict[str, dict[str, LoweredRule]] = {}
    for parameter in layer.parameters:
        instance = Instance(layer, parameter)
        name = str(parameter.base)
        wanted: list[Quantity] = list(Q.PULLBACKS)
        if instance.structure is None:
            wanted.append(Q.BLOCK)
        else:
            wanted += (*Q.OUTPUT_FACTORS, *(Q.INPUT_FACTORS if instance.structure.inner else ()))
        lowered = {q.name: _lower(layer, instance, q, f"{name}_") for q in wanted}
        parameters[name] = {quantity: rule for quantity, rule in lowered.items() if rule is not None}
    vjp = passes["vjp"]
    elementwise = (
        vjp is not None and not vjp.stages and all(not term.sums and not layer.windowed for term in vjp.formula.terms)
    )
    mixed = any(
        str(layer.input.base) in rule.operands for quantities in parameters.values() for rule in quantities.values()
    )
    return LoweredLayer(layer, passes, parameters, elementwise, mixed, _positional(layer))


def _positional(layer: Layer) -> bool:
    """Whether the input's first starred axis counts positions: each gives its own output, by the same parameters."""
    star = next((i for i in layer.input.indices if i.many), None)
    tensors = (*layer.parameters, *layer.buffers)
    sums = {i for s in layer.statements for e in s.value.atoms(IndexSum, LogSumExp) for i in e.over}
    return star in layer.output.indices and star not in sums and not any(star in t.indices for t in tensors)


def _passes(layer: Layer) -> dict[str, LoweredRule | None]:
    """What passes a layer. Where intermediates are named or the input is read through windows, Jᵀv and ∂² alone."""
    passes: dict[str, LoweredRule | None] = dict.fromkeys([*(q.name for q in Q.PASSES), "hessian"])
    if len(layer.statements) > 1:
        passes["vjp"] = composed_rule(layer, composed_vjp(layer), "vjp")
        hessian = composed_hessian(layer)
        passes["hessian"] = None if hessian is None else composed_rule(layer, hessian, "hessian")
        return passes
    on_input = Instance(layer, layer.input)
    for quantity in (Q.VJP,) if layer.windowed else Q.PASSES:
        passes[quantity.name] = _lower(layer, on_input, quantity, "")
    return passes


def composed_rule(layer: Layer, found: Sequence[Stage], name: str) -> LoweredRule:
    *stages, last = found
    assert last.tree is not None
    return _rule(layer, name, name, last.formula, (Variant("", last.tree),), tuple(stages))


def _lower(layer: Layer, instance: Instance, quantity: Quantity, prefix: str) -> LoweredRule | None:
    formula = instance.quantity(quantity, prefix + quantity.name)
    if layer.windowed:
        formula = replace(formula, terms=tuple(solve(term, "factor") for term in formula.terms))
    formula = in_output(formula, layer)
    if formula.is_zero:
        return None
    read = {str(r.base) for term in formula.terms for r in term_reads(term)}
    lead = None
    if prefix and quantity.axes[-1:] == (Q.p,):
        lead = len(quantity.axes) - 1
    centred = any(term.square is not None and term.square.centred is not None for term in formula.terms)
    own = instance.wrt_axes if prefix else ()
    programs = deviation_variants(formula, own) if centred else variants(formula, own)
    return _rule(layer, prefix + quantity.name, quantity.name, formula, programs, stages_of(layer, read), lead)


def term_reads(term: Term) -> list[Indexed]:
    return reads(term.factor) + (term_reads(term.square) if term.square is not None else [])


def _rule(
    layer: Layer,
    name: str,
    quantity: str,
    formula: Formula,
    programs: tuple[Variant, ...],
    stages: tuple[Stage, ...],
    lead: int | None = None,
) -> LoweredRule:
    """A rule with its arguments: what the engine passes first, then operands, then numbers."""
    named = {stage.name for stage in stages}
    before = [stage.tree for stage in stages if stage.tree is not None]
    trees = [*before, *(tree for program in programs for tree in program.trees)]
    stored: dict[str, Axes] = {}
    read = [leaf for tree in before for leaf in leaves(tree)] + [leaf for one in programs for leaf in one.arguments]
    for found in read:
        stored.setdefault(found.name, found.stored)
    for stage in stages:
        if stage.logsumexp is not None:
            stored.setdefault(str(stage.logsumexp.body.base), tuple(stage.logsumexp.body.indices))
    arguments = {name: stored[name] for name in EXPLICIT if name in stored}
    operands = tuple(sorted(name for name in stored if name not in EXPLICIT and name not in named))
    arguments |= {name: stored[name] for name in operands}
    shapes = _shapes(layer, {i for tree in trees for i in indices_of(tree)}, arguments)
    if layer.of_integers:  # a mask takes the parameter's dtype
        tables = {str(p.base): tuple(p.indices) for p in layer.parameters if f"{p.base}_shape" in shapes}
        arguments, operands, shapes = arguments | tables, (*operands, *tables), {}
    terms = [term for f in (*(stage.formula for stage in stages), formula) for term in f.terms]
    components = tuple(sorted({option for term in terms for option in _options(term)}, key=str))
    return LoweredRule(name, quantity, formula, arguments, operands, programs, components, stages, lead, shapes)


def _shapes(layer: Layer, needed_indices: set[Index], arguments: Mapping[str, Axes]) -> dict[str, Axes]:
    """Shapes of tensors that are not read, for the extents of windows and masks that no argument carries."""
    carried = {extent_symbol(i) for axes in arguments.values() for i in axes}
    needed = {extent_symbol(i) for i in needed_indices} - carried
    shapes: dict[str, Axes] = {}
    for tensor in (layer.input, *layer.parameters, layer.output):
        carries = {extent_symbol(i) for i in tensor.indices}
        if needed & carries:
            shapes[f"{tensor.base}_shape"] = tuple(tensor.indices)
            needed -= carries
    return shapes


def _options(term: Term) -> set[Option]:
    return term.factor.atoms(Option) | (_options(term.square) if term.square is not None else set())


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
    """The shorter of an expression and its factorisation; |z| for z sign(z)."""
    if isinstance(part, sympy.Pow):
        return sympy.Pow(_factored(part.base), part.exp)
    if not part.is_Add:
        return part
    factored = sympy.factor(part.subs([(read * sympy.sign(read), sympy.Abs(read)) for read in reads(part)]))
    return factored if factored.count_ops() < part.count_ops() else part


def _spelled_out(expr: Expr) -> Expr:
    """With functions that SymPy can evaluate."""
    return expr.replace(sigmoid, lambda z: 1 / (1 + sympy.exp(-z))).replace(
        softplus, lambda z: sympy.log(1 + sympy.exp(z))
    )


_GRID = [sympy.Rational(k, 4) for k in (-400, -40, -12, -9, -4, -3, -2, -1, 0, 1, 2, 3, 4, 9, 12, 40, 400)]


def _same_at_output(slope: Expr, read: Indexed, value: Expr) -> bool:
    """Whether slope(f(z)) = slope(z) on a grid with the usual kinks."""
    z = sympy.Symbol("z", real=True)
    slope, value = (_spelled_out(expr.xreplace({read: z})) for expr in (slope, value))
    if slope.atoms(Indexed) or slope.atoms(Option) or value.atoms(Option):
        return False
    return all(
        abs(sympy.N(slope.xreplace({z: sympy.N(value.xreplace({z: at}))}) - slope.xreplace({z: at}))) < 1e-12
        for at in _GRID
    )
