"""Fields on parameters: tensors that nobody else holds, so that a tool may change them in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Owner:
    """Hands out fields, each with memory of its own."""

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """Memory that others hold: δ, activations, parameters."""
        self._taken.update(_memory(tensor) for tensor in tensors)

    def set(self, parameter: Tensor, field: str, value: Tensor | list[Tensor]) -> list[Tensor]:
        """Set a field; its tensors."""
        owned = [self._own(tensor) for tensor in (value if isinstance(value, list) else [value])]
        setattr(parameter, field, owned if isinstance(value, list) else owned[0])
        return owned

    def _own(self, tensor: Tensor) -> Tensor:
        shared = _memory(tensor) in self._taken
        part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
        if shared or part or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._taken.add(_memory(tensor))
        return tensor


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
