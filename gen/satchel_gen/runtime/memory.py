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
#: Bytes that intermediates of a thread may share, and the number of their shapes that are remembered.
_SHARED = 1 << 22
_SHAPES = 1 << 8
_PAGE = 1 << 12
_HUGE_PAGE = 1 << 21
#: `MADV_HUGEPAGE` of Linux.
_ADVICE = 14
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def empty(shape: Sequence[int], dtype: torch.dtype, parameter: Tensor) -> Tensor:
    """An uninitialised tensor for a field of `parameter`."""
    size = prod(shape) * dtype.itemsize
    if not _may_be_kept(parameter, size):
        return parameter.new_empty(shape, dtype=dtype)
    used = kept.take(parameter, shape, dtype) if current().reuse_buffers else None
    if used is not None:
        return used
    tensor = parameter.new_empty(shape, dtype=dtype)
    return tensor if size < FRESH else _on_huge_pages(tensor, size)


def _may_be_kept(parameter: Tensor, size: int) -> bool:
    """Whether a field of so many bytes is worth it."""
    return size >= KEPT and parameter.is_cpu


class Room:
    """Memory for a field of a parameter, for whoever knows its shape."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """None where fresh pages cost little."""
        worth = _may_be_kept(self.parameter, prod(shape) * dtype.itemsize)
        return empty(shape, dtype, self.parameter) if worth else None


def room(parameter: Tensor) -> Room | None:
    """Where a field of a parameter may be computed; None if it belongs to a graph or a transform."""
    return None if torch.is_grad_enabled() or inside_functorch() else Room(parameter)


#: Where an operation computes its result, if it can: in a tensor of the result's shape, or where there is room.
Out = Tensor | Room | None


def placed(out: Out, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """The tensor for a result, if one is given or there is room."""
    return out.tensor(shape, dtype) if isinstance(out, Room) else out


def placed_or_new(out: Out, shape: Sequence[int], like: Tensor) -> Tensor:
    """The same, or a new one."""
    place = placed(out, shape, like.dtype)
    return like.new_empty(shape) if place is None else place


def copied(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A copy for a field of a parameter, where there is room."""
    place = None if tensor.requires_grad else Room(parameter).tensor(tensor.shape, tensor.dtype)
    return tensor.clone(memory_format=torch.contiguous_format) if place is None else place.copy_(tensor)


class _Bytes:
    """Memory as tensors that begin with it, one for each shape that has been asked for: to make one takes as long as fresh pages."""

    def __init__(self) -> None:
        self.whole = torch.empty(_SHARED, dtype=torch.uint8, device="cpu")
        self._tensors: dict[tuple[Sequence[int], torch.dtype], Tensor | None] = {}

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """None if it does not fit."""
        key = shape, dtype
        if key not in self._tensors:
            if len(self._tensors) == _SHAPES:
                self._tensors.clear()
            size = prod(shape) * dtype.itemsize
            self._tensors[key] = self.whole[:size].view(dtype).view(shape) if size <= _SHARED else None
        return self._tensors[key]


class _Shared(threading.local):
    """Memory of a thread."""

    def __init__(self) -> None:
        self.blocks, self.scratch = _Bytes(), _Bytes()


_shared = _Shared()


def shared(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A tensor on memory that all which are asked for have in common, if it is large enough: another one overwrites it."""
    return _shared.blocks.tensor(shape, dtype) if device.type == "cpu" and current().reuse_buffers else None


def scratch(like: Tensor) -> Tensor | None:
    """Where a function may put what it computes elementwise of a tensor, and drops before it returns: a later call overwrites it.

    None where fresh pages cost little, or where the result belongs to a graph or a transform.
    """
    if like.nbytes < KEPT or not like.is_cpu or torch.is_grad_enabled() or inside_functorch():
        return None
    return _shared.scratch.tensor(like.shape, like.dtype) if current().reuse_buffers else None


def keep(parameter: Tensor, fields: Iterable[Tensor]) -> None:
    """Let `empty` give out the memory of a parameter's fields in later passes."""
    if kept.sizes and current().reuse_buffers:
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
