"""Products with a matrix. On CPUs by oneDNN where that pays: MKL's, which `torch.mm` calls, take a tenth less on Intel's processors, a
tenth longer on others, and twice as long on some of these.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .memory import Out, placed, placed_or_new, scratch
from .torch_private import has_product, product

#: Operations of a product below which a call of oneDNN costs more than it saves, and those that pay for an element that is copied where
#: it is so many times as fast.
_LARGE = 1 << 20
_PER_COPY = 100
#: Multiplications from which on the products of a column are worth a call.
_APART = 1 << 16
_PAYS_COPIES = 1.4


def matmul(left: Tensor, right: Tensor, out: Out = None) -> Tensor:
    """A B [*, L] of A [*, K] and a matrix B [K, L], or matrices [*, K, L]; computed in `out` where torch can do that."""
    narrow = left.shape[-1] == 1
    if right.ndim == 2 and not narrow:
        return _with_matrix(left, right, out)
    place = None if out is None else placed(out, (*left.shape[:-1], right.shape[-1]), left.dtype)
    if narrow:  # a column and a row: as a product of matrices that takes several times as long
        return torch.mul(left, right, out=place)
    if right.ndim == 3 and left.ndim == 4 and _alone(left, right, place):
        if place is None:
            return torch.bmm(left[0], right)[None]
        for each, result in zip(left, place, strict=True):
            torch.bmm(each, right, out=result)
        return place
    return torch.matmul(left, right, out=place)


def _alone(left: Tensor, right: Tensor, place: Tensor | None) -> bool:
    """Whether the products of each column are computed by a call of their own, from operands as they lie: a common one copies them."""
    return len(left) == 1 or (place is not None and left.shape[1:].numel() * right.shape[-1] >= _APART)


def _with_matrix(left: Tensor, right: Tensor, out: Out) -> Tensor:
    K, L = right.shape
    work = left.numel() * L
    if work < _LARGE or left.is_cuda:
        return left @ right
    if out is not None and left.ndim == 2 and not _saves_more_than_pages(left, right):
        return torch.mm(left, right, out=placed(out, (len(left), L), left.dtype))
    onednn = has_product(left, right)
    # oneDNN reads rows of A and columns of B.
    copied = (0 if left.is_contiguous() else left.numel()) + (0 if right.mT.is_contiguous() else K * L)
    if work < _PER_COPY * copied or not onednn:
        return left @ right
    if onednn_speed() < (_PAYS_COPIES if copied else 1):
        return left @ right
    return product(left.reshape(-1, K), right.mT).reshape(*left.shape[:-1], L)


def quotient(left: Tensor, right: Tensor, over: int, out: Out = None) -> Tensor:
    """A B / over of two matrices: by the product itself, or of A, if that is not computed in `out`."""
    if over == 1:
        return matmul(left, right, out)
    if not over:  # a mean over nothing
        return matmul(left, right) / over
    if out is None or left.is_cuda or _saves_more_than_pages(left, right):
        return matmul(torch.div(left, over, out=scratch(left)), right, out)
    place = placed_or_new(out, (len(left), right.shape[1]), left)
    return torch.addmm(place, left, right, beta=0, alpha=1 / over, out=place)


def _saves_more_than_pages(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN is so much faster that it pays for fresh pages."""
    return has_product(left, right) and onednn_speed() >= _PAYS_COPIES


@cache
def onednn_speed() -> float:
    """How many times as fast as MKL oneDNN is on this machine: 0.85, 1.1 or 2. Measured once, in a few milliseconds; 0 without it."""
    matrix = torch.ones(256, 256, dtype=torch.float32, device="cpu")
    if not has_product(matrix):
        return 0.0
    ways: tuple[Callable[[], Tensor], ...] = (lambda: matrix @ matrix.mT, lambda: product(matrix, matrix))
    tries = [[_seconds(way) for way in ways] for _ in range(12)]  # in turn: other work slows both
    mkl, onednn = map(min, zip(*tries, strict=True))
    return mkl / onednn


def _seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
