"""Modes of torch, entered only where they are not in force: entering one takes as long as a small product."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_IN_FORCE = nullcontext()


def grad_mode(enabled: bool) -> AbstractContextManager[object]:
    """Record a graph inside the block, or do not."""
    return _IN_FORCE if torch.is_grad_enabled() == enabled else torch.set_grad_enabled(enabled)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Compute in the operands' own precision inside the block."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _IN_FORCE
