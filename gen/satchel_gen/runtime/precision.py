"""Half-precision operands enter as float32: sums of squares and products accumulate in float32 or wider."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` with every floating operand in one dtype, float32 or wider (mixed dtypes occur under autocast)."""

    @wraps(function)
    def call(*operands: Tensor) -> Tensor:
        first = operands[0].dtype
        if first not in _HALF and all(operand.dtype == first for operand in operands):
            return function(*operands)
        common = torch.float32
        for operand in operands:
            if operand.is_floating_point():
                common = torch.promote_types(common, operand.dtype)
        return function(*(operand.to(common) if operand.is_floating_point() else operand for operand in operands))

    return call
