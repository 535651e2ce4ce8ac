"""Lowered rules as the functions of an emitted module: names, docstrings and statements, ready for a template."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
from sympy import Expr

from ..calculus.derive import Statement
from ..calculus.instantiate import Formula
from ..calculus.terms import CalculusError, Term, terms
from ..definitions.distributions import Distribution
from ..definitions.quantities import VJP
from ..formula import render, render_formula, wrapped
from ..lowering.composed import Stage
from ..lowering.losses import LossRule, LoweredLoss
from ..lowering.plan import Axes, Map, Node, extent_symbol, leaf, plan
from ..lowering.rules import EXPLICIT, LoweredRule, term_reads
from ..lowering.squares import Variant
from ..notation import Extent, LogSumExp, Option, index_atoms, reads
from .aten import Body, unpack_extents
from .aten_expr import AtenPrinter, postfix, sequence
from .idioms import Idiom, idioms, logsumexp, softmax, softmax_of


def signature(tensors: Iterable[str], numbers: Mapping[str, str]) -> str:
    """The arguments of an emitted function: tensors, then numbers and shapes by their type."""
    return ", ".join([*(f"{name}: Tensor" for name in tensors), *(f"{name}: {kind}" for name, kind in numbers.items())])


@dataclass(frozen=True)
class Choice:
    """One program in a choice by cost: a function, or an expression that gives one."""

    function: str
    costs: Mapping[str, str]
    valid: str
    writes: bool


@dataclass(frozen=True)
class Function:
    """An emitted function. `choices`: it returns programs to choose from."""

    name: str
    formula: str
    shapes: str
    arguments: tuple[str, ...]
    lines: tuple[str, ...] = ()
    result: str = ""
    note: str = ""
    choices: tuple[Choice, ...] = ()
    entry: bool = True
    numbers: Mapping[str, str] = field(default_factory=dict)
    writes: bool = False  # to `out`, where that is given and the operation can

    @property
    def signature(self) -> str:
        given = signature(self.arguments, self.numbers)
        return f"{given}, out: Out = None" if self.writes else given

    @property
    def body(self) -> tuple[object, ...]:
        """What makes two functions the same."""
        return (self.arguments, self.lines, self.result, tuple(c.function for c in self.choices))


def shape(axes: Axes) -> str:
    return f"[{', '.join(str(extent_symbol(i)) for i in axes)}]"


def shapes_line(arguments: Mapping[str, Axes], result: Axes, groups: tuple[Axes, ...] = ()) -> str:
    given = ", ".join(f"{name} {shape(axes)}" for name, axes in arguments.items())
    returned = shape(result)
    if groups:
        returned = f"[{', '.join(' '.join(str(extent_symbol(i)) for i in group) or '1' for group in groups)}]"
    return f"{given} → {returned}" if given else f"→ {returned}"


def rule_functions(rule: LoweredRule) -> list[Function]:
    """A rule's function, preceded by its programs where there is a choice."""
    shown = () if rule.on_parameter else tuple(stage.formula for stage in rule.stages)
    formula = "\n".join(wrapped(render_formula(f)) for f in (*shown, rule.formula))
    shapes = shapes_line(rule.arguments, rule.formula.axes, rule.formula.groups)
    arguments = tuple(rule.arguments)
    numbers = dict.fromkeys(rule.shapes, "tuple[int, ...]") | {o.attribute: o.kind for o in rule.components}
    if len(rule.variants) == 1 and not rule.variants[0].blockwise:
        return [replace(_straight(rule, formula, shapes), numbers=numbers)]
    programs = [replace(_program(rule, variant), numbers=numbers) for variant in rule.variants if not variant.blockwise]
    body, writing = Body(dict(rule.arguments)), {program.name for program in programs if program.writes}
    choices = tuple(_choice(rule, variant, body, writing) for variant in rule.variants)
    entry = Function(
        rule.name, formula, shapes, arguments, tuple(unpack_extents(body.extents, rule.arguments, rule.shapes)),
        note="The cheapest program for the shapes." if len(choices) > 1 else "", choices=choices, numbers=numbers,
    )  # fmt: skip
    return [*programs, entry]


def _straight(rule: LoweredRule, formula: str, shapes: str) -> Function:
    (variant,), arguments, groups = rule.variants, rule.arguments, rule.formula.groups
    body = Body(dict(arguments), result=_written(rule, variant.tree))
    _emit_stages(body, rule)
    text = result(body, variant)
    if any(len(group) != 1 for group in groups):
        text = f"{postfix(text)}.reshape({', '.join(body.scalar(sympy.Mul(*map(Extent, group))) for group in groups)})"
    if rule.formula.blocks:
        text = f"{postfix(text)}.squeeze(0)"
    lines = unpack_extents(body.extents, arguments, rule.shapes) + body.lines
    note = "Computed in `out` where it can be." if body.writes else ""
    return Function(rule.name, formula, shapes, tuple(arguments), tuple(lines), text, note, writes=body.writes)


def result(body: Body, variant: Variant) -> str:
    """The value of a program, after its named intermediates."""
    for name, node in variant.named:
        body.lines.append(f"{name} = {body(node)}")
    return body(variant.tree)


def intermediate_functions(rule: LoweredRule) -> list[Function]:
    """One function for each of the layer's own intermediates that a parameter's rule reads: several rules share it."""
    return [_intermediate(name, rule) for name in _own_intermediates(rule)]


def _own_intermediates(rule: LoweredRule) -> list[str]:
    """Names of the stages that the rule itself reads, where all stages are the layer's."""
    if not rule.on_parameter:
        return []
    read = {leaf.name for variant in rule.variants for leaf in variant.arguments}
    return [stage.name for stage in rule.stages if stage.name in read]


def _intermediate(name: str, rule: LoweredRule) -> Function:
    chain, arguments, numbers = _chain(name, rule)
    *before, last = chain
    body = Body(dict(arguments))
    known = idioms(chain)
    _emit_chain(body, before, _read(last, known), known)
    value = _value(last, body, known)
    formula = "\n".join(wrapped(render_formula(stage.formula)) for stage in chain)
    lines = (*unpack_extents(body.extents, arguments), *body.lines)
    shapes = shapes_line(arguments, last.formula.axes)
    return Function(f"{name}_from", formula, shapes, tuple(arguments), lines, value, entry=False, numbers=numbers)


def _chain(name: str, rule: LoweredRule) -> tuple[tuple[Stage, ...], dict[str, Axes], dict[str, str]]:
    """The stages up to an intermediate, and the tensors and numbers of the rule that they read."""
    chain = rule.stages[: [stage.name for stage in rule.stages].index(name) + 1]
    terms = [term for stage in chain for term in stage.formula.terms]
    read = {str(r.base) for term in terms for r in reads(term.factor)}
    options = {option.attribute for term in terms for option in term.factor.atoms(Option)}
    numbers = {o.attribute: o.kind for o in rule.components if o.attribute in options}
    return chain, {name: axes for name, axes in rule.arguments.items() if name in read}, numbers


def _emit_stages(body: Body, rule: LoweredRule) -> None:
    """The intermediates before a rule's value: by a call of their function where several rules share them."""
    if not rule.on_parameter:
        _emit_chain(body, rule.stages, _names(rule.formula), idioms(rule.stages))
    for name in _own_intermediates(rule):
        _, arguments, numbers = _chain(name, rule)
        body.lines.append(f"{name} = {name}_from({', '.join([*arguments, *numbers])})")


def _emit_chain(body: Body, stages: Sequence[Stage], wanted: set[str], known: Mapping[str, Idiom]) -> None:
    """The intermediates that are needed for those `wanted`, in order."""
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted = wanted | _read(stage, known)
    for stage in stages:
        if stage.name in wanted:
            text = _value(stage, body, known)
            body.lines.append(f"{stage.name} = {text}")


def _read(stage: Stage, known: Mapping[str, Idiom]) -> set[str]:
    """The tensors that the emitted value of an intermediate reads."""
    return {known[stage.name].read} if stage.name in known else _names(stage.formula)


def _names(formula: Formula) -> set[str]:
    return {str(r.base) for term in formula.terms for r in term_reads(term)}


def _value(stage: Stage, body: Body, known: Mapping[str, Idiom]) -> str:
    if stage.name in known:
        return known[stage.name].text
    assert stage.tree is not None
    return body(stage.tree)


def _written(rule: LoweredRule, tree: Node) -> Node | None:
    """What may be computed in memory that is there: what belongs to a parameter, and columns in the place of those above."""
    return tree if rule.on_parameter or (rule.quantity == VJP.name and isinstance(tree, Map)) else None


NOTES = {
    "separated": "Of one summand, the square of a product is a product of squares.",
    "gram": "By the Gram matrices of both operands.",
    "centred": "Of one summand, by the deviations d = a − ā, e = b − b̄ of its operands: a b − ā b̄ = a e + b̄ d.",
}


def _program(rule: LoweredRule, variant: Variant) -> Function:
    name = f"{rule.name}_{variant.name}"
    note = NOTES[variant.name]
    arguments = tuple(rule.arguments)
    body = Body(dict(rule.arguments), result=_written(rule, variant.tree))
    _emit_stages(body, rule)
    text = result(body, variant)
    lines = unpack_extents(body.extents, rule.arguments, rule.shapes) + body.lines
    return Function(name, "", "", arguments, tuple(lines), text, note, entry=False, writes=body.writes)


def _choice(rule: LoweredRule, variant: Variant, body: Body, writing: Collection[str]) -> Choice:
    function, called, blocked = f"{rule.name}_{variant.name}", str(variant.calls_before + variant.calls), {}
    if variant.blockwise:
        assert variant.inner is not None
        own = [Extent(i) for i in variant.inner.axes if i.name not in ("v", "n")]
        each = body.scalar(sympy.Mul(*own))
        columns, samples = (body.scalar(Extent(i)) for name in ("v", "n") for i in variant.inner.axes if i.name == name)
        shape = sequence([body.scalar(extent) for extent in own])
        function = f"Blockwise({_blockwise(rule)}, {shape}{', writes=True' if _is_written(rule, variant) else ''})"
        called = f"{variant.calls} * block_count({columns}, {samples}, {each})"
        blocked = {"peak": each}
    valid = " and ".join(f"{body.scalar(Extent(i))} == 1" for i in variant.unit)
    if variant.several:
        valid = f"{body.scalar(sympy.Mul(*map(Extent, variant.several)))} > 1"
    costs = {"flops": variant.flops, "elements": variant.elements, "scratch": variant.scratch}
    counted = {name: body.scalar(cost) for name, cost in costs.items() if cost != 0}
    return Choice(function, {**counted, **blocked, "calls": called}, valid, function in writing)


def _is_written(rule: LoweredRule, variant: Variant) -> bool:
    """Whether individual pullbacks may be computed where they are to lie."""
    assert variant.inner is not None
    body = Body(dict(rule.arguments), result=variant.inner)
    _emit_stages(body, rule)
    body(variant.inner)
    return body.writes


def _blockwise(rule: LoweredRule) -> str:
    """The function of individual pullbacks, and what a quantity is of these. The input comes first, and by samples."""
    operands = [axes for name, axes in rule.arguments.items() if name not in EXPLICIT]
    by_sample = [any(i.name == "n" for i in axes) for axes in operands]
    if by_sample != sorted(by_sample, reverse=True) or sum(by_sample) != 1:
        raise CalculusError(
            f"{rule.name}: blocks of samples are taken of the first operand alone, not of {list(rule.arguments)}"
        )
    return f"{rule.name.removesuffix(rule.quantity)}per_sample, REDUCTIONS['{rule.quantity}']"


def loss_function(rule: LossRule) -> Function:
    """A rule of a loss: its intermediates, then one elementwise expression."""
    body, arguments = _loss_body(rule)
    result = _loss_value(body, rule, rule.expr)
    formula = f"{rule.name}[{', '.join(i.name for i in rule.axes)}] = {render(rule.expr)}"
    return _loss_function(rule, rule.name, formula, shapes_line(arguments, rule.axes), result, body, arguments)


def divisor_function(rule: LossRule) -> Function:
    """What a reduction divides by, where that depends on the targets."""
    body, arguments = _loss_body(rule)
    (term,) = terms(rule.expr)
    result = body(plan(term, ()))
    return _loss_function(
        rule, rule.name, f"{rule.name} = {render(rule.expr)}", shapes_line(arguments, ()), result, body, arguments
    )


def radicand_function(rule: LossRule) -> Function:
    """Whether what a factor takes the square root of is negative anywhere."""
    body, arguments = _loss_body(rule)
    result = f"({body(_elementwise(rule.expr, rule.axes))} < 0).any()"
    name, formula = rule.name.replace("radicand", "undefined"), f"any {render(rule.expr)} < 0"
    return _loss_function(rule, name, formula, shapes_line(arguments, ()), result, body, arguments)


def sample_function(lowered: LoweredLoss) -> Function | None:
    """Draws from the loss's distribution."""
    rule, drawn = lowered.sample, lowered.loss.distribution
    if rule is None or not isinstance(drawn, Distribution):
        return None
    body, arguments = _loss_body(rule)
    given = [_loss_value(body, rule, e) if reads(e) else AtenPrinter({}).doprint(e) for e in rule.exprs]
    result = f"{drawn.sampler}({', '.join(given)}, mc_samples, generator)"
    shapes = f"{shapes_line(arguments, ())[:-2]}[M, {shape(lowered.loss.outcomes)[1:]}"
    return _loss_function(rule, "sample", f"ŷ ~ {drawn}", shapes, result, body, arguments)


def _loss_body(rule: LossRule) -> tuple[Body, dict[str, Axes]]:
    """The function's body with the intermediates of the rule."""
    arguments = {str(t.base): tuple(t.indices) for t in (*rule.explicit, *rule.operands)}
    first = {
        str(t.base): tuple(t.indices) for t in rule.operands
    }  # masks take the dtype of the input, not of what is drawn
    body = Body(first | arguments)
    sums = {s.target: s.value for s in rule.intermediates if isinstance(s.value, LogSumExp)}
    stable = {s.name: softmax(total) for s in rule.intermediates if (total := softmax_of(s.value, sums)) is not None}
    values = (*rule.exprs, *(s.value for s in rule.intermediates if s.name not in stable))
    read = {str(r.base) for value in values for r in reads(value)}
    for statement in rule.intermediates:
        if statement.name in stable:
            body.lines.append(f"{statement.name} = {stable[statement.name]}")
        elif statement.name in read:
            _emit_statement(body, statement)
    return body, arguments


def _loss_value(body: Body, rule: LossRule, expr: Expr) -> str:
    if expr == 0:
        return f"torch.zeros_like({rule.operands[0].base})[None]"
    result = body(_elementwise(expr, rule.axes))
    if set(rule.axes) - index_atoms(expr):
        result = f"({result}).expand({', '.join(body.scalar(Extent(i)) for i in rule.axes)})"
    return f"({result}).flatten(0, {rule.columns - 1})" if rule.columns > 1 else result


def _loss_function(
    rule: LossRule, name: str, formula: str, shapes: str, result: str, body: Body, arguments: Mapping[str, Axes]
) -> Function:
    lines = unpack_extents(body.extents, arguments) + body.lines
    numbers = {o.attribute: o.kind for o in rule.numbers}
    return Function(name, formula, shapes, tuple(arguments), tuple(lines), result, numbers=numbers)


def _elementwise(expr: Expr, axes: Axes) -> Node:
    accessed = tuple(reads(expr))
    if len(accessed) == 1 and accessed[0] == expr and tuple(accessed[0].indices) == axes:
        return leaf(accessed[0])
    return Map(expr, accessed, tuple(leaf(read) for read in accessed), axes)


def _emit_statement(body: Body, statement: Statement) -> None:
    if isinstance(statement.value, LogSumExp):
        text = logsumexp(statement.value)
    else:
        (term,) = _as_terms(statement)
        text = body(plan(term, statement.axes))
    body.lines.append(f"{statement.name} = {text}")


def _as_terms(statement: Statement) -> Sequence[Term]:
    found = terms(statement.value)
    return [Term(statement.value)] if all(not t.sums for t in found) else found
