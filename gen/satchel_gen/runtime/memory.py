"""Memory for results that are larger than any cache: filling fresh pages of 4 KiB costs more than computing what is put there."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

from torch import Tensor

#: Bytes from which on `malloc` gives fresh pages each time, and does not keep them.
FRESH = 1 << 25
_HUGE_PAGE = 1 << 21
#: `MADV_HUGEPAGE` of Linux.
_ADVICE = 14
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of the dtype and device of `like`, on huge pages where the system gives them on request."""
    tensor = like.new_empty(shape)
    size = tensor.numel() * tensor.element_size()
    if _libc is not None and tensor.device.type == "cpu" and size >= FRESH:
        start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (tensor.data_ptr() + size) // _HUGE_PAGE * _HUGE_PAGE
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _ADVICE)  # a refusal changes nothing
    return tensor
