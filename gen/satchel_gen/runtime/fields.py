"""Fields on parameters: tensors that nobody else holds, so that a tool may change them in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


_ABSENT = object()


class Owner:
    """Hands out fields, each with memory of its own, and can undo those of this pass."""

    def __init__(self) -> None:
        self._taken: set[int] = set()
        self._before: list[tuple[Tensor, str, Any]] = []

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """Memory that others hold: δ, activations, parameters."""
        self._taken.update(_memory(tensor) for tensor in tensors)

    def set(self, parameter: Tensor, field: str, value: Tensor | list[Tensor]) -> None:
        owned = [self._own(tensor) for tensor in value] if isinstance(value, list) else self._own(value)
        self._before.append((parameter, field, getattr(parameter, field, _ABSENT)))
        setattr(parameter, field, owned)

    def undo(self) -> None:
        """Put back what was there: a number that turned out to be wrong must not be read."""
        for parameter, field, before in reversed(self._before):
            if before is not _ABSENT:
                setattr(parameter, field, before)
            elif hasattr(parameter, field):
                delattr(parameter, field)

    def _own(self, tensor: Tensor) -> Tensor:
        shared = _memory(tensor) in self._taken
        part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
        if shared or part or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._taken.add(_memory(tensor))
        return tensor


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
