"""Memory for results that are larger than any cache: filling fresh pages of 4 KiB costs more than computing what is put there.

They get what the previous pass has left, where nobody holds it any more, and otherwise huge pages, where there are enough of them.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

from torch import Tensor

from .kept import kept
from .settings import current

#: Bytes from which on `malloc` gives fresh pages each time, and does not keep them.
FRESH = 1 << 25
_PAGE = 1 << 12
_HUGE_PAGE = 1 << 21
#: `MADV_HUGEPAGE` of Linux.
_ADVICE = 14
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of the dtype and device of `like`."""
    size = prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < FRESH:
        return like.new_empty(shape)
    used = kept.take(shape, like.dtype) if current().reuse_buffers else None
    return _on_huge_pages(like.new_empty(shape), size) if used is None else used


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
