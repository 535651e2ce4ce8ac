"""What templates receive: frozen records of strings and numbers, every statement printed before rendering."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from sympy import Expr

from ..calculus.derive import Statement
from ..calculus.terms import Term
from ..definitions.model import Categorical, Feature, Layer, Loss, Quantity
from ..definitions.quantities import PULLBACKS, J, S, n, p, v, y
from ..formula import render, render_formula
from ..lowering.kernels import KernelRule, layer_kernels
from ..lowering.losses import LoweredLoss
from ..lowering.plan import Axes, plan
from ..lowering.programs import Program, Resident
from ..lowering.rules import LoweredLayer, LoweredRule
from ..notation import NDIM, Extent, Index, IndexSum, Length, Option, Sum, base_name
from .aten import AtenPrinter, Body, unpack_extents
from .functions import Function, loss_function, rule_functions, sample_function, violation_function
from .kernels.context import signature

AxisNames = tuple[str | tuple[str, ...], ...]


@dataclass(frozen=True)
class RuleContext:
    function: str
    operands: tuple[str, ...]
    kernel: str | None
    lead: int | None = None


class _Stated:
    """What is defined by formulas, one per statement."""

    formulas: tuple[str, ...]

    @property
    def formula(self) -> str:
        return "\n    ".join(self.formulas)

    @property
    def formula_literal(self) -> str:
        """A string literal, one line per statement."""
        *before, last = self.formulas
        return " ".join([*(repr(f"{line}; ") for line in before), repr(last)])


@dataclass(frozen=True)
class LayerContext(_Stated):
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


@dataclass(frozen=True)
class LossContext(_Stated):
    name: str
    module: str
    formulas: tuple[str, ...]
    kernels: str
    input_axes: tuple[str, ...]
    target_axes: tuple[str, ...]
    elements: tuple[str, ...]
    columns: tuple[str, ...]
    functions: tuple[Function, ...]
    sample: Function
    sampler: str
    rules: Mapping[str, RuleContext | None]
    violation_text: str
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


def module_name(definition: Layer | Loss | Feature) -> str:
    """Its file's own name where that spells the definition's; a file may hold several."""
    stem = definition.source.file.stem
    return stem if stem.replace("_", "") == definition.name.lower() else snake(definition.name)


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
    )


def stored_axes(layer: Layer, axes: Axes) -> AxisNames:
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


def loss_context(lowered: LoweredLoss) -> LossContext:
    loss = lowered.loss
    functions: list[Function] = []
    rules: dict[str, RuleContext | None] = {}
    for rule in lowered.rules:
        functions.append(loss_function(rule))
        rules[rule.name] = RuleContext(rule.name, tuple(str(t.base) for t in rule.operands), rule.name)
        if rule.name == "exact_factor":
            draws = tuple(str(t.base) for t in lowered.draws.operands)
            rules["sample"] = RuleContext("sample", draws, None)
    violation = violation_function(loss)
    text = ""
    if violation is not None:
        functions.append(violation)
        rules["violation"] = RuleContext("violation", violation.arguments, None)
        text = (
            f"{violation.formula.removeprefix('any ')}, {render(loss.domain[1])} the number of classes"
            if loss.domain
            else ""
        )
    sample = sample_function(lowered)
    return LossContext(
        name=loss.name,
        module=loss.module,
        formulas=tuple(str(s) for s in loss.statements),
        kernels=module_name(loss),
        input_axes=axis_names(loss.input.indices),
        target_axes=axis_names(loss.target.indices),
        elements=tuple(i.name for i in loss.terms.indices),
        columns=tuple(base_name(i) for i in lowered.columns),
        functions=tuple(functions),
        sample=sample,
        sampler="categorical" if isinstance(loss.distribution, Categorical) else "normal",
        rules=rules,
        violation_text=text,
        options=repr(dict(loss.options)),
    )


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
        signature=", ".join(f"{name}: Tensor" for name in rule.arguments),
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
        signature=signature(program),
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
        "source": next(iter(curvature), "gradient"), "locals": [], "value": "", "table5": "",
        "needs": [(source, q.name) for source, quantities in feature.needs.items() for q in quantities],
    }  # fmt: skip
    if isinstance(feature.value, Mapping):
        named = {a: tuple(q.name for q in factors) for a, factors in feature.value.items()}
        context["factors"] = repr(named)
        context["only_approximation"] = next(iter(named))
        context |= {"value_text": "[B, A] as above, with the loss's own c inside s", "table5_text": "[B · u / N, A]"}
        return context
    if curvature:
        parts = sympy.Add.make_args(feature.value)
        order = [q.name for quantities in feature.needs.values() for q in quantities]
        context["summands"] = tuple(sorted((str(part) for part in parts), key=order.index))
        context |= {"value_text": "as above, with the loss's own c inside", "table5_text": "that · u / N"}
        return context
    context |= {"value_text": feature.formula, "table5_text": _table5_text(feature)}
    symbols = {q.symbol: f'q["{q.name}"]' for quantities in feature.needs.values() for q in quantities}
    if "subsampling" in feature.options:
        context["locals"] = [
            'individual = q["per_sample"][0]',
            "if self.subsampling is not None:",
            "    individual = individual[list(self.subsampling)]",
        ]
        symbols = dict.fromkeys(symbols, "individual")
    names = {**symbols, sympy.Symbol("N"): "sizes.N", sympy.Symbol("u"): "sizes.u"}
    context |= {
        "value": _scalar_print(feature.value, names),
        "table5": _scalar_print(feature.table5 or feature.value, names),
    }
    return context


def _table5_text(feature: Feature) -> str:
    """The formula with quantities in the field's notation."""
    notation = {"sum_of_squares": "Σ_n g_n²", "squared_norm": "‖g_n‖²", "per_sample": "g_n", "gradient": "(Σ_n g_n)"}
    text = render(feature.table5) if feature.table5 is not None else ""
    for name, symbol in notation.items():
        text = text.replace(name, symbol)
    return text


def _scalar_print(expr: Expr, names: Mapping[sympy.Symbol, str]) -> str:
    return AtenPrinter(names, scalars=frozenset(sympy.symbols("N u"))).doprint(expr)


def reduction_functions() -> list[Function]:
    """Every pullback quantity from stored pullbacks: the same formulas, with T a tensor."""
    functions = []
    stored = sympy.IndexedBase("per_sample")[v, n, p]
    pullback = Sum(J[n, y, p] * S[v, n, y], y)
    for quantity in PULLBACKS:
        if quantity.value == pullback or not quantity.value.has(S):
            continue
        functions.append(_reduction(quantity, quantity.value.xreplace({pullback: stored})))
    return functions


def _reduction(quantity: Quantity, value: Expr) -> Function:
    assert isinstance(value, IndexSum)
    term = Term(value.body, frozenset(value.over))
    statement = Statement(sympy.IndexedBase(quantity.name)[quantity.axes], value)
    weighted = "sign" in {str(r.base) for r in value.atoms(sympy.Indexed)}
    arguments: dict[str, Axes] = {"per_sample": (v, n, p)} | ({"sign": (v, n)} if weighted else {})
    flat = Index("p")
    body = Body(arguments, renamed={"per_sample": "per_sample.flatten(2)"})
    body_term = term.rename({p: flat})
    text = body(plan(body_term, tuple(flat if i == p else i for i in quantity.axes)))
    if p in quantity.axes:
        text = f"{text}.unflatten(-1, per_sample.shape[2:])"
    return Function(quantity.name, str(statement), "", tuple(arguments), (), text, entry=False)


def table(layers: tuple[Layer, ...], losses: tuple[Loss, ...]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """File and constant of every definition, for the registry."""
    named = [
        [{"name": d.name, "file": module_name(d), "constant": module_name(d).upper()} for d in group]
        for group in (layers, losses)
    ]
    return named[0], named[1]
