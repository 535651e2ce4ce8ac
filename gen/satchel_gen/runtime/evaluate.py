"""Runs a rule: resolves its operands, and picks the backend."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from .rules import Layer, Loss, Rule
from .settings import current

#: The package that this runtime belongs to; its `kernels` are imported when first used.
_PACKAGE = __name__.rsplit(".", 2)[0]


def evaluate(
    rule: Rule,
    definition: Layer | Loss,
    operand: Callable[[str], Any],
    *arguments: Any,
    differentiable: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The rule's value; `operand` gives an operand by name. Only the ATen program is differentiable, and writes to `out`."""
    values = [*arguments, *map(operand, rule.operands)]
    if rule.kernel is None or differentiable or not uses_kernel(rule, values):
        return rule.aten(*values) if out is None else rule.aten(*values, out=out)
    return getattr(import_module(f"{_PACKAGE}.kernels.{definition.kernels}"), rule.kernel)(*values)


def uses_kernel(rule: Rule, values: list[Any]) -> bool:
    """Whether there is a Triton kernel for the rule, and it is to be used on these operands."""
    return rule.kernel is not None and _fused(values)


def _fused(values: list[Any]) -> bool:
    backend = current().backend
    if backend == "auto":
        return any(isinstance(value, Tensor) and value.is_cuda for value in values)
    return backend == "triton"
