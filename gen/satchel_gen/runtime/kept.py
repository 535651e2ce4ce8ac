"""Memory of fields, kept from one pass over a parameter to the next, and given out again once nobody else holds it.

Nothing is kept but what such a pass has left on its parameter, and only as long as the parameter lives.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from math import prod
from threading import Lock

import torch
from torch import Tensor

from .torch_private import held_elsewhere


class Kept:
    """By parameter. Each is a tensor of its own on the memory of a field; when it is given out it is no longer kept."""

    def __init__(self) -> None:
        #: By the parameter's id. A dictionary of weak references takes ten times as long.
        self._tensors: dict[int, tuple[weakref.ref[Tensor], list[Tensor]]] = {}
        #: What has been asked for. Fields of other sizes are made by operations that allocate for themselves.
        self.sizes: set[int] = set()
        self._lock = Lock()

    def take(self, parameter: Tensor, shape: Iterable[int], dtype: torch.dtype) -> Tensor | None:
        """An uninitialised tensor on memory that was kept for the parameter, if there is any of this size."""
        shape = tuple(shape)
        size = prod(shape) * dtype.itemsize
        with self._lock:
            self.sizes.add(size)
            tensors = self._of(parameter) or []
            for place, tensor in enumerate(tensors):
                fits = tensor.dtype == dtype and tensor.untyped_storage().nbytes() == size
                if fits and not held_elsewhere(tensor):
                    return tensors.pop(place).view(shape)
        return None

    def keep(self, parameter: Tensor, fields: Iterable[Tensor]) -> None:
        """Keep the memory of these instead of what the pass before has left. Only the CPU's: others have an allocator that keeps it."""
        tensors = [field.data for field in fields if field.nbytes in self.sizes and field.is_cpu]
        if not tensors and id(parameter) not in self._tensors:
            return
        with self._lock:
            before = self._of(parameter)
            if before is not None:
                before[:] = tensors
            elif tensors:
                key = id(parameter)
                self._tensors[key] = weakref.ref(parameter, partial(self._forget, key)), tensors

    def _of(self, parameter: Tensor) -> list[Tensor] | None:
        """What is kept for a parameter, if anything ever was; not for one that had its id before."""
        reference, tensors = self._tensors.get(id(parameter), (None, None))
        return tensors if reference is not None and reference() is parameter else None

    def _forget(self, key: int, reference: weakref.ref[Tensor]) -> None:
        """A parameter is gone; another may have its id by now. Without the lock, which this thread may hold."""
        if self._tensors.get(key, (None, []))[0] is reference:
            self._tensors.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._tensors.clear()


kept = Kept()
