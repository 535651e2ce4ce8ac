"""Sums of squares over leading axes: where these are few, each is added at once and not stored."""

from __future__ import annotations

import itertools

from torch import Tensor

#: Elements of what is left of a tensor from which on a call for each of the others costs less than storing their squares.
_LONG = 1 << 14


def summed_squares(tensor: Tensor, axes: int) -> Tensor:
    """Σ x² over the first axes, so many."""
    lead = tensor.shape[:axes]
    if tensor.is_cuda or not lead.numel() or tensor.numel() < _LONG * lead.numel():
        return tensor.square().sum(tuple(range(axes)))
    first, *rest = itertools.product(*map(range, lead))
    total = tensor[first].square()
    for place in rest:
        total.addcmul_(tensor[place], tensor[place])
    return total
