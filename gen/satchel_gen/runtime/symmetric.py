"""Products of a matrix with its own transpose: no more than the upper half of them, in strips."""

from __future__ import annotations

from torch import Tensor

from .matmul import matmul

#: Rows of a strip: fewer make narrow products, more compute more of the lower half.
_STRIP = 128


def gram(rows: Tensor, over: int = 1) -> Tensor:
    """AᵀA / over [D, D] of A [K, D]."""
    size = rows.shape[1]
    if rows.is_cuda or size < 2 * _STRIP:
        return rows.mT @ rows / over
    columns = rows.mT.contiguous()
    scaled = columns / over
    if len(rows) < 2 * _STRIP:  # the lower half is computed faster than copied
        return matmul(scaled, columns.mT)
    result = rows.new_empty(size, size)
    for first in range(0, size, _STRIP):
        end = min(first + _STRIP, size)
        result[first:end, first:] = matmul(scaled[first:end], columns[first:].mT)
        result[end:, first:end] = result[first:end, end:].mT
    return result
