"""Squared deviations as a difference of two moments, Σ_n (T_n − mean T)² = Σ T² − (Σ T)² / N, where that costs few digits.

Rounding errors of both moments grow by Σ T² / Σ (T − mean T)². Whether that is small is read off the result, element by element;
where it is not, the programs that centre first are run after all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cost import forced_program
from .memory import scratch

#: The least part of Σ T² that may be left. In float32 products over 128 samples are 6e-7 off, so that this leaves 5e-6.
LEAST = 1 / 8
#: Samples below which it is not tried: of so few, some of many elements nearly agree by chance.
FEWEST = 16


def serve(factor: Tensor) -> bool:
    """Whether two moments of the pullbacks of a factor [V, N, *output] are worth a try: of one column, where reading a number waits
    for no device, and where nothing is differentiated."""
    V, N = factor.shape[:2]
    if V != 1 or N < FEWEST or factor.device.type != "cpu":
        return False
    return not torch.is_grad_enabled() and forced_program() is None


def difference(squares: Tensor, total: Tensor, samples: int, spent: bool) -> Tensor | None:
    """Σ T² − (Σ T)² / N [*p] of Σ T² and Σ T; None if some element cancels, or is not finite. spent: nobody else needs `squares`."""
    weight = -1 / samples
    spare = torch.sub(squares, squares, alpha=LEAST, out=scratch(squares))  # NaN of NaN and ∞, and so is the least then
    spare.addcmul_(total, total, value=weight)
    if spare.numel() and not spare.amin().item() >= 0:
        return None
    return torch.addcmul(squares, total, total, value=weight, out=squares if spent else None)
