"""What only values can tell, and when it is read: a flag is a tensor, so that asking does not wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import SatchelError

#: Whether something is wrong, a boolean scalar, and the error that says what.
Flag: TypeAlias = tuple[Tensor, SatchelError]


def first_raised(flags: Sequence[Flag]) -> SatchelError | None:
    """The error of the first flag that is true. Reads the device once."""
    if not flags:
        return None
    device = flags[0][0].device
    raised = torch.stack([flag.reshape(()).to(device) for flag, _ in flags]).tolist()
    return next((error for (_, error), true in zip(flags, raised, strict=True) if true), None)
