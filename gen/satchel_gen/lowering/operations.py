"""The rules of an operation: for every input, its second derivative along all inputs. The first is the node's own, a fused kernel."""

from __future__ import annotations

from dataclasses import dataclass

from sympy import IndexedBase

from ..definitions.operation import Operation
from .composed import V, composed_hessian
from .rules import LoweredRule, composed_rule


@dataclass(frozen=True)
class LoweredOperation:
    """By input: hessian(delta), which reads tangents, `tangent_<input>`. Absent: zero."""

    operation: Operation
    hessian: dict[str, LoweredRule]


def lower_operation(operation: Operation) -> LoweredOperation:
    tangents = [(x, IndexedBase(f"tangent_{x.base}")[(V, *x.indices)]) for x in operation.inputs]
    hessian: dict[str, LoweredRule] = {}
    for tensor in operation.inputs:
        name, layer = str(tensor.base), operation.of(tensor)
        second = composed_hessian(layer, tangents)
        if second is not None:
            hessian[name] = composed_rule(layer, second, f"hessian_{name}")
    return LoweredOperation(operation, hessian)
