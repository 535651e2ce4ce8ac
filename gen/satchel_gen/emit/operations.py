"""What the template of an operation receives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sympy import Expr, Indexed

from ..lowering.operations import LoweredOperation
from ..notation import Extent
from .aten_expr import AtenPrinter
from .contexts import AxisNames, RuleContext, Stated, axis_names
from .functions import Function, rule_functions
from .layers import stored_axes


@dataclass(frozen=True)
class OperationContext(Stated):
    name: str
    formulas: tuple[str, ...]
    functions: tuple[Function, ...]
    inputs: Mapping[str, AxisNames]
    operands: Mapping[str, AxisNames]
    output: AxisNames
    widest: tuple[str, ...]
    hessian: Mapping[str, RuleContext]
    absent: Mapping[str, str]
    nodes: tuple[str, ...]


def operation_context(lowered: LoweredOperation) -> OperationContext:
    operation, rules = lowered.operation, lowered.hessian

    def axes(tensors: Iterable[Indexed]) -> dict[str, AxisNames]:
        return {str(tensor.base): stored_axes(operation, tensor.indices) for tensor in tensors}

    return OperationContext(
        name=operation.name,
        formulas=tuple(str(s) for s in operation.statements),
        hessian={n: RuleContext(rule.name, (*rule.operands, *rule.numbers), None) for n, rule in rules.items()},
        functions=tuple(function for rule in rules.values() for function in rule_functions(rule)),
        inputs=axes(operation.inputs),
        operands=axes(operation.operands),
        output=stored_axes(operation, operation.output.indices),
        widest=axis_names(operation.widest.indices),
        absent={option.attribute: _of_extents(value) for option, value in operation.absent.items()},
        nodes=tuple(
            f"OperationNode({node.name!r}, {dict(node.saved)!r}, {dict(node.options)!r})" for node in operation.nodes
        ),
    )


def _of_extents(value: Expr) -> str:
    """A number as a function of the extents by axis."""
    names = {e: f'extents["{e.args[0].name}"]' for e in value.atoms(Extent)}
    return f"lambda extents: {AtenPrinter(names, scalars=frozenset(names)).doprint(value)}"
