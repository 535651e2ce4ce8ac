"""Modes of torch, entered only where they are not in force: entering one takes as long as a small product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_IN_FORCE = nullcontext()
#: Seconds that it takes to wake threads for an operation.
_WAKING = 3e-5


def grad_mode(enabled: bool) -> AbstractContextManager[object]:
    """Record a graph inside the block, or do not."""
    return _IN_FORCE if torch.is_grad_enabled() == enabled else torch.set_grad_enabled(enabled)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Compute in the operands' own precision inside the block."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _IN_FORCE


def with_few_threads(
    function: Callable[..., Tensor], seconds: float, calls: int, operands: Sequence[Any], out: Mapping[str, Tensor]
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
