"""What templates receive: frozen records of strings and numbers, every statement printed before rendering."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from sympy import Expr

from ..calculus.derive import Statement
from ..calculus.instantiate import Formula
from ..calculus.terms import Term
from ..definitions.distributions import Distribution, NoDistribution
from ..definitions.model import Classes, Feature, Layer, Loss, NodeCall, Quantity
from ..definitions.operation import Operation
from ..definitions.quantities import BLOCKS, PER_SAMPLE, PULLBACKS, SAMPLES, UNIT, S, T, n, p, p2, v
from ..formula import render, render_formula, wrapped
from ..lowering.deviations import deviation_variants
from ..lowering.kernels import KernelRule, layer_kernels, loss_kernels
from ..lowering.losses import LossRule, LoweredLoss
from ..lowering.plan import Axes, extent_symbol, plan
from ..lowering.programs import Program, Resident
from ..lowering.rules import LoweredLayer, LoweredRule
from ..lowering.squares import Variant
from ..notation import NDIM, ONE, Centred, Extent, IndexSum, Length, Option, base_name
from .aten import AtenPrinter, Body, unpack_extents
from .functions import (
    Function,
    divisor_function,
    intermediate_functions,
    loss_function,
    radicand_function,
    result,
    rule_functions,
    sample_function,
    signature,
    violation_function,
)
from .kernels.context import launcher_signature

AxisNames = tuple[str | tuple[str, ...], ...]


@dataclass(frozen=True)
class RuleContext:
    function: str
    operands: tuple[str, ...]
    kernel: str | None
    lead: int | None = None


class Stated:
    """What is defined by formulas, one per statement."""

    formulas: tuple[str, ...]

    @property
    def formula(self) -> str:
        return "\n".join(map(wrapped, self.formulas))

    @property
    def formula_literal(self) -> str:
        """A string literal, one line per statement."""
        *before, last = self.formulas
        return " ".join([*(repr(f"{line}; ") for line in before), repr(last)])


@dataclass(frozen=True)
class LayerContext(Stated):
    name: str
    module: str
    formulas: tuple[str, ...]
    kernels: str
    input_axes: AxisNames
    output_axes: AxisNames
    parameter_axes: Mapping[str, AxisNames]
    functions: tuple[Function, ...]
    passes: Mapping[str, RuleContext | None]
    elementwise: bool
    mixed: bool
    positional: bool
    parameters: Mapping[str, Mapping[str, RuleContext]]
    buffers: tuple[str, ...]
    extents: Mapping[str, str | int]
    ranks: Mapping[str, str]
    numbers: tuple[str, ...]
    operation: str
    saved: tuple[str, ...]
    when: str
    absent: str
    reasons: str
    approximation: str
    options: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class LossContext(Stated):
    name: str
    module: str
    formulas: tuple[str, ...]
    notes: tuple[str, ...]
    kernels: str
    input_axes: tuple[str, ...]
    target_axes: tuple[str, ...]
    operands: Mapping[str, tuple[str, ...]]
    arguments: tuple[str, ...]
    elements: tuple[str, ...]
    columns: tuple[str, ...]
    functions: tuple[Function, ...]
    sample: Function | None
    sampler: str
    rules: Mapping[str, RuleContext]
    reductions: Mapping[str, RuleContext | tuple[str, ...]]
    violation_text: str
    no_likelihood: str
    classes: bool
    numbers: tuple[str, ...]
    when: str
    options: str


@dataclass(frozen=True)
class Dispatcher:
    """A Triton rule that takes another program where axes have extent 1."""

    name: str
    formula: str
    signature: str
    valid: str
    lines: tuple[str, ...]
    separated: str
    otherwise: str
    before: tuple[str, ...] = ()  # what `valid` needs


def snake(name: str) -> str:
    """CrossEntropyLoss → cross_entropy_loss."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def module_name(definition: Layer | Loss | Feature | Operation) -> str:
    """Its file's own name where the definition's begins with that; a file may hold several."""
    stem, name = definition.source.file.stem, definition.name
    spelled = len(stem.replace("_", ""))
    if stem.replace("_", "") != name[:spelled].lower():
        return snake(name)
    rest = snake(name[spelled:])
    return f"{stem}_{rest}" if rest[:1].isalpha() else stem + rest


def axis_names(axes: Axes) -> tuple[str, ...]:
    return tuple(f"{i.name}*" if i.many else i.name for i in axes)


def layer_context(lowered: LoweredLayer) -> LayerContext:
    layer = lowered.layer
    kernels = {kernel.rule.name for kernel in layer_kernels(lowered)}
    functions: list[Function] = []
    known: dict[tuple[object, ...], str] = {}

    def context(rule: LoweredRule | None) -> RuleContext | None:
        if rule is None:
            return None
        for shared in intermediate_functions(rule):
            if shared.body not in known:
                known[shared.body] = shared.name
                functions.append(shared)
        emitted = rule_functions(rule)
        entry = emitted[-1]
        if entry.body not in known:
            known[entry.body] = entry.name
            functions.extend(emitted)
        operands = (*rule.operands, *rule.numbers)
        return RuleContext(known[entry.body], operands, rule.name if rule.name in kernels else None, rule.lead)

    passes = {name: context(rule) for name, rule in lowered.passes.items()}
    parameters = {
        name: {quantity: found for quantity, rule in rules.items() if (found := context(rule)) is not None}
        for name, rules in lowered.parameters.items()
    }
    return LayerContext(
        name=layer.name,
        module=layer.module,
        formulas=tuple(str(s) for s in layer.statements),
        kernels=module_name(layer) if kernels else "",
        input_axes=stored_axes(layer, layer.input.indices),
        output_axes=stored_axes(layer, layer.output.indices),
        parameter_axes={str(p.base): stored_axes(layer, p.indices) for p in layer.parameters},
        functions=tuple(functions),
        passes=passes,
        elementwise=lowered.elementwise,
        mixed=lowered.mixed,
        positional=lowered.positional,
        parameters=parameters,
        buffers=tuple(str(b.base) for b in layer.buffers),
        extents={i.name: size.attribute if isinstance(size, Option) else size for i, size in layer.extents.items()},
        ranks={index.name: _rank(rank) for index, rank in layer.ranks.items()},
        numbers=layer.numbers,
        operation=layer.operation,
        saved=layer.saved,
        when=repr(dict(layer.when)),
        absent=repr(dict(layer.absent)),
        reasons=repr(dict(layer.reasons)),
        approximation=layer.approximation,
        options=repr(dict(layer.options)),
        nodes=tuple(_node_call(layer, node) for node in layer.nodes),
    )


def stored_axes(layer: Layer | Operation, axes: Axes) -> AxisNames:
    """Axis names as torch stores them: joined indices as one tuple."""
    names: list[str | tuple[str, ...]] = []
    rest = list(axes)
    while rest:
        joined = next((group for group in layer.joined if tuple(rest[: len(group)]) == group), rest[:1])
        found = axis_names(tuple(joined))
        names.append(found if len(found) > 1 else found[0])
        rest = rest[len(joined) :]
    return tuple(names)


def _rank(rank: Expr) -> str:
    """The number of axes of a starred index, as a function of options and of the tensor's own number of axes."""
    names = {o: f'options["{o.attribute}"]' for o in rank.atoms(Option)}
    names |= {length: f'len(options["{length.args[0].attribute}"])' for length in rank.atoms(Length)}
    return f"lambda options, ndim: {AtenPrinter(names, scalars=frozenset([NDIM])).doprint(rank)}"


def _node_call(layer: Layer, node: NodeCall) -> str:
    """A node that is a call of the layer, as the runtime has it: axes by their position in the parameter."""
    axes = {str(p.base): tuple(p.indices) for p in layer.parameters}
    parameters = {
        name: (position, tuple(axes[name].index(axis) for axis in there))
        for name, (position, there) in node.parameters.items()
    }
    options = f", {dict(node.options)!r}" if node.options else ""
    return f"NodeCall({node.name!r}, {node.input!r}, {parameters!r}{options})"


def loss_context(lowered: LoweredLoss) -> LossContext:
    loss = lowered.loss
    functions: list[Function] = []
    kernels = {program.name for program in loss_kernels(lowered)}

    def context(function: Function, operands: tuple[str, ...], numbers: Iterable[str]) -> RuleContext:
        functions.append(function)
        name = function.name
        return RuleContext(name, (*operands, *numbers), name if name in kernels else None)

    def of(rule: LossRule, function: Function) -> RuleContext:
        return context(function, tuple(str(t.base) for t in rule.operands), (o.attribute for o in rule.numbers))

    rules = {rule.name: of(rule, loss_function(rule)) for rule in lowered.rules}
    known: dict[Expr, RuleContext] = {}
    for factor, rule in lowered.radicands.items():
        if rule.expr not in known:
            known[rule.expr] = of(rule, radicand_function(rule))
        rules[f"{factor}_undefined"] = known[rule.expr]
    violation = violation_function(loss)
    if violation is not None:
        rules["violation"] = context(violation, violation.arguments, violation.numbers)
    reductions: dict[str, RuleContext | tuple[str, ...]] = {}
    for name, divisor in loss.reductions.items():
        reductions[name] = (
            of(lowered.divisors[name], divisor_function(lowered.divisors[name]))
            if name in lowered.divisors
            else tuple(str(e.args[0]) for e in sorted(divisor.atoms(Extent), key=str))
        )
    sample = sample_function(lowered)
    if sample is not None and lowered.sample is not None:
        operands = tuple(str(t.base) for t in lowered.sample.operands)
        rules["sample"] = RuleContext("sample", (*operands, *sample.numbers), None)
    drawn = loss.distribution
    return LossContext(
        name=loss.name,
        module=loss.module,
        formulas=tuple(str(s) for s in loss.statements),
        notes=tuple(_loss_notes(lowered)),
        kernels=module_name(loss) if kernels else "",
        input_axes=axis_names(loss.input.indices),
        target_axes=axis_names(loss.target.indices),
        operands={str(t.base): axis_names(t.indices) for t in loss.operands},
        arguments=loss.arguments,
        elements=tuple(i.name for i in loss.terms.indices),
        columns=tuple(base_name(i) for i in lowered.columns),
        functions=tuple(functions),
        sample=sample,
        sampler=drawn.sampler if isinstance(drawn, Distribution) else "",
        rules=rules,
        reductions=reductions,
        violation_text=_violation_text(loss),
        no_likelihood=drawn.reason if isinstance(drawn, NoDistribution) else "",
        classes=isinstance(loss.domain, Classes),
        numbers=lowered.numbers,
        when=repr(dict(loss.when)),
        options=repr(dict(loss.options)),
    )


def _loss_notes(lowered: LoweredLoss) -> Iterator[str]:
    """What a reader must know of the curvature that starts here."""
    loss, derived = lowered.loss, lowered.derived
    if not derived.hessian:
        yield "∇²ℓ = 0: the features of the exact Gauss-Newton matrix are zero."
    if isinstance(loss.distribution, NoDistribution):
        yield f"No negative log-likelihood: {loss.distribution.reason}. Monte-Carlo features refuse it."
        return
    weight = "" if loss.weight == 1 else f", weighted by {render(loss.weight)}"
    relation = "which is ∇²ℓ" if derived.fisher else "which is not ∇²ℓ"
    yield f"Monte-Carlo features estimate the Fisher of {loss.distribution}{weight}, {relation}."


def _violation_text(loss: Loss) -> str:
    if not isinstance(loss.domain, Classes):
        return ""
    count = extent_symbol(loss.domain.over)
    return f"target outside 0 ≤ y < {count}, {count} the number of classes, and not the ignored {loss.domain.ignored}"


def layer_programs(lowered: LoweredLayer) -> tuple[list[Program], list[Dispatcher]]:
    """The kernels of a layer and the functions that choose between them."""
    programs: list[Program] = []
    dispatchers = []
    for kernel in layer_kernels(lowered):
        programs.append(kernel.program)
        if kernel.separated_program is not None:
            programs.append(kernel.separated_program)
        if kernel.separated is not None:
            dispatchers.append(_dispatcher(kernel))
        if isinstance(kernel.program, Resident):
            dispatchers.append(_within_registers(kernel.rule, kernel.program))
    return programs, dispatchers


def _dispatcher(kernel: KernelRule) -> Dispatcher:
    rule, separated = kernel.rule, kernel.separated
    assert separated is not None
    body = Body(dict(rule.arguments))
    if kernel.separated_program is None:
        result = body(separated.tree)
    else:
        program = kernel.separated_program
        given = []
        for read, node in zip((program.a, program.b), kernel.operands, strict=True):
            # A square is taken by the kernel, on load.
            text = body(node.children[0] if read.square and hasattr(node, "children") else node)
            given.append(body.local(read.tensor, text) if read.tensor in ("total", "product") else text)
        result = f"{program.name}({', '.join(given)})"
    first = next(iter(rule.arguments))
    places = [list(rule.arguments[first]).index(i) for i in separated.unit]
    return Dispatcher(
        name=rule.name,
        formula=render_formula(rule.formula),
        signature=signature(rule.arguments, {}),
        valid=" and ".join(f"{first}.shape[{place}] == 1" for place in places),
        lines=tuple(unpack_extents(body.extents, rule.arguments) + body.lines),
        separated=result,
        otherwise=f"{kernel.program.name}({', '.join(rule.arguments)})",
    )


def _within_registers(rule: LoweredRule, program: Resident) -> Dispatcher:
    """The kernel where a row fits into registers, else ATen."""
    body = Body(dict(rule.arguments))
    axes = {i.name: i for i in rule.formula.axes}
    elements, stride = (
        body.scalar(sympy.Mul(*(Extent(axes[a]) for a in part))) for part in (program.row, program.after)
    )
    called = ", ".join([*rule.arguments, *rule.numbers])
    return Dispatcher(
        name=rule.name,
        formula=program.value,
        signature=launcher_signature(program),
        valid=f"resident({elements}, {stride}, {', '.join(rule.arguments)})",
        lines=(),
        separated=f"{program.name}({called})",
        otherwise=f"aten.{rule.name}({called})",
        before=tuple(unpack_extents(body.extents, rule.arguments)),
    )


_OPTION_TYPES = {
    "mc_samples": "int = 1",
    "generator": "torch.Generator | None = None",
    "subsampling": "Sequence[int] | None = None",
    "approximation": "str | None = None",
}
_OPTION_TEXTS = {
    "mc_samples": "number M of Monte-Carlo samples per input.",
    "generator": "where they are drawn from; torch's global generator stays untouched if one is given.",
    "subsampling": "indices of the samples to compute, None for all; the scale stays that of the whole batch.",
    "approximation": 'treatment of shared axes, "expand", "reduce" or "backpack"; None for the layer\'s default.',
}


def feature_context(feature: Feature) -> dict[str, Any]:
    """The context of extension.py.jinja."""
    curvature = set(feature.needs) - {"gradient", "input"}
    context: dict[str, Any] = {
        "name": feature.name, "field": feature.field, "file": module_name(feature), "formula": feature.formula,
        "shape": feature.shape, "reference": feature.reference, "options": feature.options,
        "option_types": _OPTION_TYPES, "option_texts": _OPTION_TEXTS, "factors": "", "summands": (),
        "summary": f"{feature.name}, the field `{feature.field}`.", "differentiable": set(feature.needs) == {"gradient"},
        "source": next(iter(curvature), "gradient"), "value": "", "table5": "", "block": "",
        "value_text": "as above, with the loss's own c inside" if curvature else feature.formula,
        "needs": [(source, q.name) for source, quantities in feature.needs.items() for q in quantities],
    }  # fmt: skip
    if isinstance(feature.value, Mapping):
        named = {a: tuple(q.name for q in factors) for a, factors in feature.value.items()}
        assert feature.block is not None
        context |= {"factors": repr(named), "only_approximation": next(iter(named)), "block": feature.block.name}
        context |= {"value_text": "[B, A] as above, with the loss's own c inside s", "table5_text": "[B · u / N, A]"}
        return context
    context["table5_text"] = _table5_text(feature)
    if isinstance(feature.value, sympy.Add):  # of columns from several sources, not all of which need arise
        context |= {"summands": feature.value.args, "value": "value", "table5": "value * (sizes.u / sizes.N)"}
        return context
    # δ is one column.
    symbols = {
        q.symbol: f'q["{q.name}"]' + ("[0]" if (source, q) == ("gradient", PER_SAMPLE) else "")
        for source, quantities in feature.needs.items()
        for q in quantities
    }
    names = {**symbols, UNIT: "sizes.u", SAMPLES: "sizes.N"}
    value = _scalar_print(feature.value, names)
    table5 = f"{value} * (sizes.u / sizes.N)" if feature.table5 is None else _scalar_print(feature.table5, names)
    return context | {"value": value, "table5": table5}


def _table5_text(feature: Feature) -> str:
    """Table 5's scaling relative to BackPACK's, or the formula with quantities in the field's notation."""
    if feature.table5 is None:
        return "that · u / N"
    ratio = feature.table5 / feature.value
    if ratio.free_symbols <= {UNIT, SAMPLES}:
        return f"that · {render(ratio)}"
    return render(feature.table5).replace("squared_norm", "‖g_n‖²")


def _scalar_print(expr: Expr, names: Mapping[sympy.Symbol, str]) -> str:
    return AtenPrinter(names, scalars=frozenset({UNIT, SAMPLES})).doprint(expr)


def reduction_functions() -> list[Function]:
    """Every quantity of pullbacks from stored ones: the same formulas, with T a tensor."""
    stored = sympy.IndexedBase("per_sample")
    pullbacks = {T: stored[v, n, p], T.xreplace({p: p2}): stored[v, n, p2]}
    found = [quantity for quantity in (*PULLBACKS, *BLOCKS) if quantity.value != T and quantity.value.has(S)]
    return [_reduction(quantity, quantity.value.xreplace(pullbacks)) for quantity in found]


def _reduction(quantity: Quantity, value: Expr) -> Function:
    assert isinstance(value, IndexSum)
    body, sums = value.body, frozenset(value.over)
    if isinstance(body, sympy.Pow) and isinstance(body.base, Centred):
        term = Term(ONE, sums, (), Term(body.base.body, centred=body.base.over))
        (variant,) = deviation_variants(Formula(quantity.name, quantity.axes, (term,)))
    else:
        variant = Variant("", plan(Term(body, sums), quantity.axes))
    weighted = "sign" in {str(r.base) for r in value.atoms(sympy.Indexed)}
    arguments: dict[str, Axes] = {"per_sample": (v, n, p)} | ({"sign": (v, n)} if weighted else {})
    printed = Body(arguments, renamed={"per_sample": "per_sample.flatten(2)"})
    text = result(printed, variant)
    if p in quantity.axes and not quantity.matrix:
        text = f"({text}).reshape(per_sample.shape[{2 - quantity.axes.index(p)} :])"
    lines = unpack_extents(printed.extents, arguments) + printed.lines
    statement = Statement(sympy.IndexedBase(quantity.name)[quantity.axes], value)
    return Function(quantity.name, str(statement), "", tuple(arguments), tuple(lines), text, entry=False)


def table(layers: tuple[Layer, ...], losses: tuple[Loss, ...]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """File and constant of every definition, for the registry."""
    named = [
        [{"name": d.name, "file": module_name(d), "constant": module_name(d).upper()} for d in group]
        for group in (layers, losses)
    ]
    return named[0], named[1]
