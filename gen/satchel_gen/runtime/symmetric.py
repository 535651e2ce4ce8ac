"""Products of matrices with their own transpose: of one no more than the upper half, in strips; of many summed."""

from __future__ import annotations

from functools import reduce
from operator import add

from torch import Tensor

from .matmul import matmul, quotient
from .memory import Out, placed_or_new

#: Rows of a strip: fewer make narrow products, more compute more of the lower half.
_STRIP = 128
#: Elements that are copied next to each other, for one product instead of many: as many as caches hold.
_TOGETHER = 1 << 20


def gram(rows: Tensor, over: int = 1, out: Out = None) -> Tensor:
    """AᵀA / over [D, D] of A [K, D]; computed in `out` where that saves memory."""
    size = rows.shape[1]
    if rows.is_cuda or size < 2 * _STRIP:
        product = matmul(rows.mT, rows)
        return product if over == 1 else product / over
    if len(rows) < 2 * _STRIP:  # the lower half is computed faster than copied
        return quotient(rows.mT, rows, over, out)
    columns = rows.mT.contiguous()
    result = placed_or_new(out, (size, size), rows)
    for first in range(0, size, _STRIP):
        end = min(first + _STRIP, size)
        strip = matmul(columns[first:end], columns[first:].mT)
        result[first:end, first:] = strip if over == 1 else strip.div_(over)
        result[end:, first:end] = result[first:end, end:].mT
    return result


def summed_gram(tensor: Tensor, lead: int) -> Tensor:
    """Σ A Aᵀ [*, D, D] of matrices A [*lead, *, D, K], over the first axes, so many."""
    matrices = tensor.flatten(0, lead - 1)
    if len(matrices) == 1:
        return matmul(matrices[0], matrices[0].mT)
    each = matrices[:1].numel()
    size = len(matrices) if tensor.is_cuda else _TOGETHER // max(each, 1)
    return reduce(add, (_of_rows(some.movedim(0, -2)) for some in matrices.split(max(size, 1))))


def _of_rows(tensor: Tensor) -> Tensor:
    """B Bᵀ [*, D, D] of [*, D, N, K] as B [*, D, N K]."""
    rows = tensor.flatten(-2)
    if rows.shape[:-2].numel() == 1:
        matrix = rows.reshape(rows.shape[-2:])
        return matmul(matrix, matrix.mT).reshape(*rows.shape[:-1], len(matrix))
    return rows @ rows.mT
