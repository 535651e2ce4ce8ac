"""Fields on parameters: tensors that nobody else holds, so that a tool may change them in place."""

from __future__ import annotations

import weakref
from collections.abc import Collection

from torch import Tensor

from .memory import copied


class Owner:
    """Hands out the fields of a pass, each with memory of its own."""

    def __init__(self) -> None:
        self._fields: dict[int, weakref.ref[Tensor]] = {}

    def set(self, parameter: Tensor, field: str, value: Tensor | list[Tensor], lent: Collection[int]) -> list[Tensor]:
        """Set a field; its tensors. `lent`: addresses of what others hold, δ, activations and parameters.

        A value that lies further into the memory of one of these is smaller than that memory, and copied for that.
        """
        owned: list[Tensor] = []
        for tensor in value if isinstance(value, list) else (value,):
            start = memory_of(tensor)
            before = self._fields.get(start)  # of a field that is gone, the memory is free again
            shared = start in lent or (before is not None and before() is not None)
            if shared or tensor.untyped_storage().nbytes() > tensor.nbytes or not tensor.is_contiguous():
                tensor = copied(tensor, parameter)
                start = memory_of(tensor)
            self._fields[start] = weakref.ref(tensor)
            owned.append(tensor)
        setattr(parameter, field, owned if isinstance(value, list) else owned[0])
        return owned


def memory_of(tensor: Tensor) -> int:
    """Where a tensor's memory begins. Its storage is not asked: autograd adds to no gradient in place whose storage Python has seen."""
    return tensor.data_ptr() - int(tensor.storage_offset()) * tensor.element_size()
