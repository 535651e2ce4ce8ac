"""Half-precision operands enter as float32: sums of squares and products accumulate in float32 or wider."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce, wraps
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_SINGLE = {torch.float32}


def widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` with every floating operand in one dtype, float32 or wider (mixed dtypes occur under autocast)."""

    @wraps(function)
    def call(*operands: Any, **out: Any) -> Tensor:
        for operand in operands:
            if isinstance(operand, Tensor) and operand.dtype is not torch.float32:
                break
        else:
            return function(*operands, **out)
        floating = _floating(operands)
        if len(floating) < 2 and floating.isdisjoint(_HALF):
            return function(*operands, **out)
        common = _common(floating)
        return function(*(_to(common, operand) for operand in operands), **out)

    return call


def widened_dtype(operands: Iterable[Any]) -> torch.dtype:
    """The dtype that they have in a function that is `widened`."""
    return _common(_floating(operands))


def _floating(operands: Iterable[Any]) -> set[torch.dtype]:
    return {operand.dtype for operand in operands if isinstance(operand, Tensor) and operand.is_floating_point()}


def _common(floating: Iterable[torch.dtype]) -> torch.dtype:
    return torch.float32 if floating == _SINGLE else reduce(torch.promote_types, floating, torch.float32)


def _to(dtype: torch.dtype, operand: Any) -> Any:
    return operand.to(dtype) if isinstance(operand, Tensor) and operand.is_floating_point() else operand
