"""Lowered rules as the functions of an emitted module: names, docstrings and statements, ready for a template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
from sympy import Expr

from ..calculus.derive import Statement
from ..calculus.terms import Term, terms
from ..definitions.model import Loss, Normal
from ..formula import render, render_formula
from ..lowering.composed import Stage
from ..lowering.losses import LossRule, LoweredLoss
from ..lowering.plan import Axes, Map, Node, extent_symbol, leaf, plan
from ..lowering.rules import LoweredRule
from ..lowering.squares import Variant
from ..notation import Extent, LogSumExp, index_atoms, reads
from .aten import Body, unpack_extents


@dataclass(frozen=True)
class Choice:
    """One program in a choice by cost."""

    function: str
    costs: Mapping[str, str]
    valid: str


@dataclass(frozen=True)
class Function:
    """An emitted function. `choices`: its body picks the cheapest program; `total`: it accumulates block by block."""

    name: str
    formula: str
    shapes: str
    arguments: tuple[str, ...]
    lines: tuple[str, ...] = ()
    result: str = ""
    note: str = ""
    choices: tuple[Choice, ...] = ()
    block: Block | None = None
    entry: bool = True
    numbers: Mapping[str, str] = field(default_factory=dict)

    @property
    def signature(self) -> str:
        tensors = [f"{name}: Tensor" for name in self.arguments]
        return ", ".join([*tensors, *(f"{name}: {kind}" for name, kind in self.numbers.items())])

    @property
    def called(self) -> str:
        return ", ".join([*self.arguments, *self.numbers])

    @property
    def body(self) -> tuple[object, ...]:
        """What makes two functions the same."""
        return (self.arguments, self.lines, self.result, tuple(c.function for c in self.choices), self.block)


@dataclass(frozen=True)
class Block:
    """Accumulation over blocks of columns and samples."""

    columns: str
    samples: str
    each: str
    shape: str
    like: str
    target: str
    lines: tuple[str, ...]
    summand: str


def shape(axes: Axes) -> str:
    return f"[{', '.join(str(extent_symbol(i)) for i in axes)}]"


def shapes_line(arguments: Mapping[str, Axes], result: Axes) -> str:
    given = ", ".join(f"{name} {shape(axes)}" for name, axes in arguments.items())
    return f"{given} → {shape(result)}" if given else f"→ {shape(result)}"


def rule_functions(rule: LoweredRule) -> list[Function]:
    """A rule's function, preceded by its programs where there is a choice."""
    formula = "\n    ".join(render_formula(f) for f in (*(stage.formula for stage in rule.stages), rule.formula))
    shapes = shapes_line(rule.arguments, rule.formula.axes)
    arguments = tuple(rule.arguments)
    numbers = dict.fromkeys(rule.shapes, "tuple[int, ...]") | {o.attribute: o.kind for o in rule.components}
    if len(rule.variants) == 1:
        return [replace(_straight(rule, formula, shapes, rule.variants[0].tree), numbers=numbers)]
    programs = [replace(_program(rule, variant), numbers=numbers) for variant in rule.variants]
    body = Body(dict(rule.arguments))
    choices = tuple(_choice(rule, variant, body) for variant in rule.variants)
    entry = Function(
        rule.name, formula, shapes, arguments, tuple(unpack_extents(body.extents, rule.arguments, rule.shapes)),
        note="The cheapest program for the shapes.", choices=choices, numbers=numbers,
    )  # fmt: skip
    return [*programs, entry]


def _straight(rule: LoweredRule, formula: str, shapes: str, tree: Node) -> Function:
    body = Body(dict(rule.arguments))
    _emit_stages(body, rule.stages)
    result = body(tree)
    lines = unpack_extents(body.extents, rule.arguments, rule.shapes) + body.lines
    return Function(rule.name, formula, shapes, tuple(rule.arguments), tuple(lines), result)


def _emit_stages(body: Body, stages: Sequence[Stage]) -> None:
    for stage in stages:
        if stage.logsumexp is not None:
            text = _logsumexp(stage.logsumexp)
        else:
            assert stage.tree is not None
            text = body(stage.tree)
        body.lines.append(f"{stage.name} = {text}")


NOTES = {
    "separated": "Of one summand, the square of a product is a product of squares.",
    "per_sample": "By the individual products, stored whole.",
    "blockwise": "By the individual products, in blocks that stay in cache.",
    "gram": "By the Gram matrices of both operands.",
}


def _program(rule: LoweredRule, variant: Variant) -> Function:
    name = f"{rule.name}_{variant.name}"
    note = NOTES[variant.name]
    arguments = tuple(rule.arguments)
    if variant.blockwise:
        block, extents = _block(rule, variant)
        return Function(name, "", "", arguments, extents, note=note, block=block, entry=False)
    body = Body(dict(rule.arguments))
    _emit_stages(body, rule.stages)
    result = body(variant.tree)
    lines = unpack_extents(body.extents, rule.arguments, rule.shapes) + body.lines
    return Function(name, "", "", arguments, tuple(lines), result, note, entry=False)


def _block(rule: LoweredRule, variant: Variant) -> tuple[Block, tuple[str, ...]]:
    body = Body(dict(rule.arguments), slices={"v": "columns", "n": "samples"})
    columns, samples, each = _loops(variant, body)
    out = rule.formula.axes
    sizes = ", ".join(body.scalar(Extent(i)) for i in out)
    summand = body(variant.tree)
    target = "total[samples]" if any(i.name == "n" for i in out) else "total"
    block = Block(columns, samples, each, sizes, next(iter(rule.arguments)), target, tuple(body.lines), summand)
    before = Body(dict(rule.arguments))
    _emit_stages(before, rule.stages)
    return block, (*unpack_extents(body.extents | before.extents, rule.arguments, rule.shapes), *before.lines)


def _loops(variant: Variant, body: Body) -> tuple[str, str, str]:
    """Extents of the columns and samples that a blockwise program loops over, and the elements of one product."""
    assert variant.inner is not None
    each = sympy.Mul(*(Extent(i) for i in variant.inner.axes if i.name not in ("v", "n")))
    columns, samples = (body.scalar(Extent(i)) for name in ("v", "n") for i in variant.inner.axes if i.name == name)
    return columns, samples, body.scalar(each)


def _choice(rule: LoweredRule, variant: Variant, body: Body) -> Choice:
    called = str(variant.calls)
    if variant.blockwise:
        called = f"{variant.calls} * block_count({', '.join(_loops(variant, body))})"
    valid = " and ".join(f"{body.scalar(Extent(i))} == 1" for i in variant.unit)
    costs = {"flops": variant.flops, "elements": variant.elements, "scratch": variant.scratch, "peak": variant.peak}
    counted = {name: body.scalar(cost) for name, cost in costs.items() if cost != 0}
    return Choice(f"{rule.name}_{variant.name}", {**counted, "calls": called}, valid)


def loss_function(rule: LossRule) -> Function:
    """A rule of a loss: its intermediates, then one elementwise expression."""
    arguments = {str(t.base): tuple(t.indices) for t in (*rule.explicit, *rule.operands)}
    body = Body(dict(arguments))
    for statement in rule.intermediates:
        _emit_statement(body, statement)
    result = body(_elementwise(rule.expr, rule.axes))
    if set(rule.axes) - index_atoms(rule.expr):
        result = f"({result}).expand({', '.join(body.scalar(Extent(i)) for i in rule.axes)})"
    if rule.columns > 1:
        result = f"({result}).flatten(0, {rule.columns - 1})"
    lines = unpack_extents(body.extents, arguments) + body.lines
    formula = f"{rule.name}[{', '.join(i.name for i in rule.axes)}] = {render(rule.expr)}"
    return Function(rule.name, formula, shapes_line(arguments, rule.axes), tuple(arguments), tuple(lines), result)


def _elementwise(expr: Expr, axes: Axes) -> Node:
    accessed = tuple(reads(expr))
    if len(accessed) == 1 and accessed[0] == expr and tuple(accessed[0].indices) == axes:
        return leaf(accessed[0])
    return Map(expr, accessed, tuple(leaf(read) for read in accessed), axes)


def _emit_statement(body: Body, statement: Statement) -> None:
    if isinstance(statement.value, LogSumExp):
        text = _logsumexp(statement.value)
    else:
        (term,) = _as_terms(statement)
        text = body(plan(term, statement.axes))
    body.lines.append(f"{statement.name} = {text}")


def _logsumexp(value: LogSumExp) -> str:
    read = value.body
    dims = [list(read.indices).index(i) for i in value.over]
    return f"torch.logsumexp({read.base}, {dims[0] if len(dims) == 1 else tuple(dims)})"


def _as_terms(statement: Statement) -> Sequence[Term]:
    found = terms(statement.value)
    return [Term(statement.value)] if all(not t.sums for t in found) else found


def sample_function(lowered: LoweredLoss) -> Function:
    """Draws from the loss's distribution."""
    rule, loss = lowered.draws, lowered.loss
    arguments = {str(t.base): tuple(t.indices) for t in rule.operands}
    body = Body(dict(arguments))
    for statement in rule.intermediates:
        _emit_statement(body, statement)
    value = body(_elementwise(rule.expr, rule.axes))
    if isinstance(loss.distribution, Normal):
        result = f"normal({value}, math.sqrt({loss.distribution.variance}), mc_samples, generator)"
        formula = f"ŷ ~ N({render(loss.distribution.mean)}, {render(loss.distribution.variance)})"
    else:
        result = f"categorical({value}, mc_samples, generator)"
        formula = f"ŷ ~ p = {render(loss.distribution.probabilities)}"
    shapes = f"{shapes_line(arguments, ())[:-2]}[M, {shape(tuple(loss.target.indices))[1:]}"
    return Function("sample", formula, shapes, tuple(arguments), tuple(body.lines), result)


def violation_function(loss: Loss) -> Function | None:
    """Whether a target lies outside its domain."""
    if loss.domain is None:
        return None
    lower, upper = loss.domain
    name = str(loss.target.base)
    arguments = {name: tuple(loss.target.indices), str(loss.input.base): tuple(loss.input.indices)}
    body = Body(dict(arguments))
    low, high = body.scalar(lower), body.scalar(upper)
    lines = tuple(unpack_extents(body.extents, arguments))
    formula = f"any target outside {low} ≤ y < {high}"
    return Function(
        "violation",
        formula,
        shapes_line(arguments, ()),
        tuple(arguments),
        lines,
        f"(({name} < {low}) | ({name} >= {high})).any()",
    )
