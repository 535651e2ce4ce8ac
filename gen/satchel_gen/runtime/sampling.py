"""Draws from the distributions behind losses. A given generator leaves the global random state untouched."""

from __future__ import annotations

import torch
from torch import Tensor


def categorical(probabilities: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """Class indices [samples, *leading] ~ probabilities[*leading, classes]."""
    rows = probabilities.flatten(0, -2)
    device = rows.device if generator is None else generator.device
    drawn = torch.multinomial(rows.to(device), samples, replacement=True, generator=generator)
    return drawn.to(rows.device).T.reshape(samples, *probabilities.shape[:-1])


def normal(mean: Tensor, deviation: float, samples: int, generator: torch.Generator | None) -> Tensor:
    """Draws [samples, *shape] ~ N(mean, deviation²), elementwise."""
    device = mean.device if generator is None else generator.device
    noise = torch.randn((samples, *mean.shape), dtype=mean.dtype, device=device, generator=generator)
    return mean + deviation * noise.to(mean.device)
