"""Sums that store no more than they must, and moments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import scratch

#: Elements of what is left of a tensor from which on a call for each of the others costs less than storing their squares.
_LONG = 1 << 14


def summed(tensor: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    """Σ x over an axis, or several; where these have one entry, this entry, which torch would copy."""
    shape = tensor.shape
    for axis in (axes,) if isinstance(axes, int) else axes:
        if shape[axis] != 1:
            return tensor.sum(axes)
    return tensor.squeeze(axes)


def summed_squares(tensor: Tensor, axes: int) -> Tensor:
    """Σ x² over the first axes, so many: as far as these are few, each is added at once."""
    count = 0 if tensor.is_cuda or tensor.numel() < _LONG else axes
    while count and not 0 < _LONG * tensor.shape[:count].numel() <= tensor.numel():
        count -= 1
    if not count:
        return _squares(tensor).sum(tuple(range(axes)))
    rows = [tensor]
    for _ in range(count):
        rows = [row for some in rows for row in some.unbind()]
    total = _squares(rows[0]) if count < axes else rows[0].square()
    for row in rows[1:]:
        total.addcmul_(row, row)
    return total.sum(tuple(range(axes - count))) if count < axes else total


def _squares(tensor: Tensor) -> Tensor:
    """x², to be summed at once: a later call overwrites it."""
    return torch.square(tensor, out=scratch(tensor))


def squared_norms(tensor: Tensor, axis: int) -> Tensor:
    """Σ x² over all axes but one; of one column and its like in one pass, without a tensor of squares, unless that is differentiated."""
    axes = [*range(axis), *range(axis + 1, tensor.ndim)]
    if tensor.requires_grad or tensor.shape[:axis].numel() != 1:
        return tensor.square().sum(axes)
    return torch.linalg.vector_norm(tensor, dim=axes).square()


def summed_products(equation: str, one: Tensor, other: Tensor) -> Tensor:
    """An einsum of x [*s] and y [*v, *s], or y and x, to sums of x y over some of *s in the order of y.

    Of one column, elementwise: as products of a row and a column, which einsum makes of them, they take several times as long.
    """
    if one.is_cuda or one.numel() != other.numel():
        return torch.einsum(equation, one, other)
    operands, _, kept = equation.partition("->")
    axes = max(operands.split(","), key=len)
    room = scratch(one if one.ndim > other.ndim else other) if one.dtype == other.dtype else None
    return torch.mul(one, other, out=room).sum([place for place, axis in enumerate(axes) if axis not in kept])


def standardised(tensor: Tensor, axes: int, eps: float) -> Tensor:
    """(x − E[x]) / √(Var[x] + ε), the moments over the last axes, so many. Of x centred before: what rounding leaves of a mean is small.

    On a CPU as one sample whose channels are groups of their own: torch's layer norm without a weight is no loop over vectors, and takes
    two to three times as long.
    """
    over = tuple(range(tensor.ndim - axes, tensor.ndim))
    mean = tensor.mean(over, keepdim=True)
    if tensor.is_cuda or not tensor.numel():
        return F.layer_norm(tensor - mean, tensor.shape[over[0] :], eps=eps)
    centred = torch.sub(tensor, mean, out=scratch(tensor))
    rows = mean.numel()
    return torch.group_norm(centred.reshape(1, rows, -1), rows, eps=eps).view(tensor.shape)
