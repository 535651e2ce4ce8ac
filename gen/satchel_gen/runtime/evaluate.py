"""Runs a rule: resolves its operands, and picks the backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any

from torch import Tensor

from .memory import Out
from .modes import with_few_threads
from .rules import Layer, Loss, Rule
from .settings import current

#: The package that this runtime belongs to; its `kernels` are imported when first used.
_PACKAGE = __name__.rsplit(".", 2)[0]
#: Seconds that an element takes, and operations, of a rule that is not heavy.
_EACH, _CALLS = 5e-10, 3
_NOTHING: Mapping[str, Any] = MappingProxyType({})


def evaluate(
    rule: Rule,
    definition: Layer | Loss,
    operand: Callable[[str], Any],
    *arguments: Any,
    differentiable: bool = False,
    out: Out = None,
) -> Tensor:
    """The rule's value; `operand` gives an operand by name. Only the ATen program is differentiable, and takes `out`, if it `writes`."""
    values = [*arguments, *map(operand, rule.operands)]
    if rule.kernel is not None and not differentiable and _fused(values):
        return getattr(import_module(f"{_PACKAGE}.kernels.{definition.kernels}"), rule.kernel)(*values)
    return computed(rule, definition, values, {"out": out} if rule.writes and out is not None else {})


def computed(
    rule: Rule, definition: Layer | Loss, values: Sequence[Any], given: Mapping[str, Any] = _NOTHING
) -> Tensor:
    """The value of the rule's ATen program, on few threads where it is little work."""
    if rule.heavy:
        return rule.aten(*values, **given)
    return with_few_threads(rule.aten, _seconds(values, isinstance(definition, Loss)), _CALLS, values, given)


def _seconds(values: Sequence[Any], factor: bool) -> float:
    """What a rule takes one thread that reads each element a few times; or, of a loss, writes a column for each element of a sample."""
    columns, elements = 1, 0
    for value in values:
        if isinstance(value, Tensor):
            elements += value.numel()
            if factor:
                columns = max(columns, value.shape[1:].numel())
    return _EACH * columns * elements


def uses_kernel(rule: Rule, values: list[Any]) -> bool:
    """Whether there is a Triton kernel for the rule, and it is to be used on these operands."""
    return rule.kernel is not None and _fused(values)


def _fused(values: list[Any]) -> bool:
    backend = current().backend
    if backend != "auto":
        return backend == "triton"
    for value in values:
        if isinstance(value, Tensor):  # all are on one device
            return value.is_cuda
    return False
