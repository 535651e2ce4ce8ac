"""Memory of fields, kept from one pass over a parameter to the next, and given out again once nobody else holds it.

Nothing is kept but what such a pass has left on its parameter, and only as long as the parameter lives.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from threading import Lock

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .torch_private import held_elsewhere


class Kept:
    """By parameter. Each is a tensor of its own on the memory of a field; when it is given out it is no longer kept."""

    def __init__(self) -> None:
        self._by_parameter = WeakTensorKeyDictionary()
        #: Ids of the parameters that have some, and of any that are gone: looking a parameter up takes longer.
        self._ids: set[int] = set()
        #: What has been asked for. Fields of other sizes are made by operations that allocate for themselves.
        self._sizes: set[int] = set()
        self._lock = Lock()

    def take(self, parameter: Tensor, shape: Iterable[int], dtype: torch.dtype) -> Tensor | None:
        """An uninitialised tensor on memory that was kept for the parameter, if there is any of this size."""
        shape = tuple(shape)
        size = prod(shape) * dtype.itemsize
        with self._lock:
            self._sizes.add(size)
            tensors = self._by_parameter.get(parameter, ())
            for place, tensor in enumerate(tensors):
                fits = tensor.dtype == dtype and tensor.untyped_storage().nbytes() == size
                if fits and not held_elsewhere(tensor):
                    return tensors.pop(place).view(shape)
        return None

    def keep(self, parameter: Tensor, fields: Iterable[Tensor]) -> None:
        """Keep the memory of these instead of what the pass before has left. Only the CPU's: others have an allocator that keeps it."""
        if not self._sizes:
            return
        tensors = [field.data for field in fields if field.nbytes in self._sizes and field.is_cpu]
        key = id(parameter)
        with self._lock:
            if tensors:
                self._by_parameter[parameter] = tensors
                self._ids.add(key)
            elif key in self._ids:
                self._by_parameter.pop(parameter, None)
                self._ids.discard(key)

    def clear(self) -> None:
        with self._lock:
            self._by_parameter.clear()
            self._ids.clear()


kept = Kept()
