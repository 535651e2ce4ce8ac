"""Draws from the distributions behind losses. A given generator leaves the global random state untouched."""

from __future__ import annotations

import torch
from torch import Tensor


def categorical(probabilities: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """Class indices [samples, *leading] ~ probabilities[*leading, classes]."""
    rows = probabilities.flatten(0, -2)
    weights = rows if generator is None else rows.to(generator.device)
    if samples == 1:
        drawn = _one_of_each(weights, generator)
    else:
        drawn = torch.multinomial(weights, samples, replacement=True, generator=generator).T
    return drawn.to(rows.device).reshape(samples, *probabilities.shape[:-1])


def _one_of_each(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Of each row a place, as likely as its weight: the first to come of exponential times with these rates.

    It is what `torch.multinomial` does for a single draw, with the same random numbers, but for its checks of the weights.
    """
    times = torch.empty_like(weights).exponential_(generator=generator)
    return torch.div(weights, times, out=times).argmax(-1)


def normal(mean: Tensor, variance: Tensor | float, samples: int, generator: torch.Generator | None) -> Tensor:
    """Draws [samples, *shape] ~ N(mean, variance), elementwise."""
    device = mean.device if generator is None else generator.device
    noise = torch.randn((samples, *mean.shape), dtype=mean.dtype, device=device, generator=generator)
    return mean + noise.to(mean.device) * variance**0.5


def laplace(mean: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """Draws [samples, *shape] from densities exp(−|y − mean|) / 2."""
    device = mean.device if generator is None else generator.device
    distance = torch.empty((samples, *mean.shape), dtype=mean.dtype, device=device).exponential_(generator=generator)
    sign = torch.randint(0, 2, distance.shape, dtype=mean.dtype, device=device, generator=generator) * 2 - 1
    return mean + (distance * sign).to(mean.device)


def bernoulli(probability: Tensor, other: int, samples: int, generator: torch.Generator | None) -> Tensor:
    """Draws [samples, *shape] of 1 with `probability`, else `other`."""
    device = probability.device if generator is None else generator.device
    expanded = probability.to(device).expand(samples, *probability.shape)
    return (torch.bernoulli(expanded, generator=generator) * (1 - other) + other).to(probability.device)


def poisson(rate: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """Counts [samples, *shape] with the given rates."""
    device = rate.device if generator is None else generator.device
    return torch.poisson(rate.to(device).expand(samples, *rate.shape), generator=generator).to(rate.device)
