"""Modes of torch, entered only where they are not in force: entering one takes as long as a small product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .torch_private import is_any_autocast_enabled

T = TypeVar("T")
#: Seconds that it takes to wake threads for an operation: 8 to 16 µs where OpenMP lets them spin, 35 to 47 where it does not.
_WAKING = 5e-5


def in_grad_mode(enabled: bool, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """The value of `function`, which records a graph or does not."""
    if torch.is_grad_enabled() == enabled:
        return function(*arguments, **options)
    with torch.set_grad_enabled(enabled):
        return function(*arguments, **options)


def without_autocast(tensors: Iterable[Tensor | None], function: Callable[..., T], *arguments: Any) -> T:
    """The value of `function`, computed in the operands' own precision, where some tensors are."""
    if not is_any_autocast_enabled():
        return function(*arguments)
    device = next((tensor.device.type for tensor in tensors if tensor is not None), "cpu")
    with torch.autocast(device, enabled=False):
        return function(*arguments)


def with_few_threads(
    function: Callable[..., Tensor], seconds: float, calls: int, operands: Sequence[Any], out: Mapping[str, Any]
) -> Tensor:
    """The value of `function`, which takes one thread `seconds` for so many of torch's operations: on one, where others would sleep
    again before the next and waking them takes longer than they save."""
    threads = torch.get_num_threads()
    if threads == 1 or seconds * (1 - 1 / threads) >= calls * _WAKING:
        return function(*operands, **out)
    torch.set_num_threads(1)
    try:
        return function(*operands, **out)
    finally:
        torch.set_num_threads(threads)
