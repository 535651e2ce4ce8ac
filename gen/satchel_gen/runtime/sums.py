"""Sums that store no more than they must."""

from __future__ import annotations

import itertools

from torch import Tensor

#: Elements of what is left of a tensor from which on a call for each of the others costs less than storing their squares.
_LONG = 1 << 14


def summed(tensor: Tensor, axis: int) -> Tensor:
    """Σ x over an axis; where that has one entry, this entry, which torch would copy."""
    return tensor.squeeze(axis) if tensor.shape[axis] == 1 else tensor.sum(axis)


def summed_squares(tensor: Tensor, axes: int) -> Tensor:
    """Σ x² over the first axes, so many: as far as these are few, each is added at once."""
    for count in range(axes, 0, -1):
        lead = tensor.shape[:count]
        if not tensor.is_cuda and lead.numel() and tensor.numel() >= _LONG * lead.numel():
            break
    else:
        return tensor.square().sum(tuple(range(axes)))
    first, *others = itertools.product(*map(range, lead))
    total = tensor[first].square()
    for place in others:
        total.addcmul_(tensor[place], tensor[place])
    return total.sum(tuple(range(axes - count))) if count < axes else total
