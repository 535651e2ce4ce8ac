"""Memory for large results: filling fresh pages of 4 KiB costs more than computing what is put there.

They get what the previous pass has left, where nobody holds it any more; otherwise, if they are larger than any cache, huge pages, where
there are enough of them. Intermediates get what the last of them has left.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .kept import kept
from .settings import current
from .torch_private import inside_functorch

#: Bytes from which on `malloc` gives fresh pages each time, and does not keep them.
FRESH = 1 << 25
#: Bytes from which on the memory of a field is kept: what lies at the end of the heap when it is freed goes back to the system, too.
KEPT = 1 << 18
#: Bytes that intermediates of a thread may share.
_SHARED = 1 << 22
_PAGE = 1 << 12
_HUGE_PAGE = 1 << 21
#: `MADV_HUGEPAGE` of Linux.
_ADVICE = 14
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def empty(shape: Sequence[int], dtype: torch.dtype, parameter: Tensor) -> Tensor:
    """An uninitialised tensor for a field of `parameter`."""
    size = prod(shape) * dtype.itemsize
    if parameter.device.type != "cpu" or size < KEPT:
        return parameter.new_empty(shape, dtype=dtype)
    used = kept.take(parameter, shape, dtype) if current().reuse_buffers else None
    if used is not None:
        return used
    tensor = parameter.new_empty(shape, dtype=dtype)
    return tensor if size < FRESH else _on_huge_pages(tensor, size)


class _Shared(threading.local):
    """Memory of a thread."""

    def __init__(self) -> None:
        self.blocks, self.scratch = (torch.empty(_SHARED, dtype=torch.uint8, device="cpu") for _ in range(2))


_shared = _Shared()


def shared(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A tensor on memory that all which are asked for have in common, if it is large enough: another one overwrites it."""
    return _on(_shared.blocks, shape, dtype, device)


def scratch(*tensors: Tensor) -> Tensor | None:
    """Where a function may put what it computes elementwise of tensors of one size, and drops before it returns: a later call overwrites
    it. None where fresh pages cost little, or where the result belongs to a graph or a transform.
    """
    like = max(tensors, key=Tensor.dim)
    if like.nbytes < KEPT or torch.is_grad_enabled() or inside_functorch():
        return None
    if any([tensor.dtype != like.dtype for tensor in tensors]):
        return None
    return _on(_shared.scratch, like.shape, like.dtype, like.device)


def _on(memory: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A tensor at the beginning of a thread's memory, if it fits and memory may be used again."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size > _SHARED or not current().reuse_buffers:
        return None
    return memory[:size].view(dtype).view(shape)


def keep(parameter: Tensor, fields: Iterable[Tensor]) -> None:
    """Let `empty` give out the memory of a parameter's fields in later passes."""
    if current().reuse_buffers:
        kept.keep(parameter, fields)


def _on_huge_pages(tensor: Tensor, size: int) -> Tensor:
    if _libc is not None and 2 * size <= _free_in_huge_pages():
        start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (tensor.data_ptr() + size) // _HUGE_PAGE * _HUGE_PAGE
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _ADVICE)  # a refusal changes nothing
    return tensor


def _free_in_huge_pages() -> int:
    """Bytes that the system has free in pieces of a huge page or more. Where it has to make some, filling them takes ten times as long."""
    try:
        zones = Path("/proc/buddyinfo").read_text().splitlines()
    except OSError:
        return 0
    # Each line: "Node 0, zone Normal", and the number of free pieces of 1, 2, 4 … pages.
    pieces = [(_PAGE << order, int(count)) for zone in zones for order, count in enumerate(zone.split()[4:])]
    return sum(size * count for size, count in pieces if size >= _HUGE_PAGE)
