"""Context of layer.py.jinja."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sympy import Expr

from ..definitions.model import Layer, NodeCall
from ..definitions.operation import Operation
from ..lowering.kernels import KernelRule
from ..lowering.plan import Axes
from ..lowering.rules import LoweredLayer, LoweredRule
from ..notation import NDIM, Length, Option
from .aten_expr import AtenPrinter
from .contexts import AxisNames, RuleContext, Stated, axis_names, module_name
from .functions import Function, intermediate_functions, rule_functions


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


def layer_context(lowered: LoweredLayer, kernels: Collection[KernelRule]) -> LayerContext:
    layer = lowered.layer
    fused = {kernel.rule.name for kernel in kernels}
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
        kernel = rule.name if rule.name in fused else None
        operands = (*rule.operands, *rule.numbers)
        return RuleContext(known[entry.body], operands, kernel, rule.lead, entry.writes, rule.heavy, rule.composed)

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
