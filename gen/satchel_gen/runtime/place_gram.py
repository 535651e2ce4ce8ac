"""Products of windows at two places: Σ_{c,a} x[n, g, c, s·h + d·a − p] x[n, g, c, s·h′ + d·a − p], by sample.

Each is a sum over the taps of products of two elements, Σ_c x[c, u] x[c, u′], which windows share: these are computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .windows import padded


def place_gram(
    tensor: Tensor,
    places: Sequence[int],
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """[N, G, C, *spatial] → [N, G, *places, *places]."""
    N, G = tensor.shape[:2]
    images = padded(tensor, places, taps, stride, dilation, padding)
    elements, extents = images.flatten(3), images.shape[3:]
    pairs = (elements.mT @ elements).reshape(N, G, *extents, *extents)

    def at(tap: Sequence[int]) -> Tensor:
        """The products that both windows have at one tap."""
        geometry = zip(tap, places, stride, dilation, strict=True)
        along = [slice(d * a, d * a + s * (h - 1) + 1, s) for a, h, s, d in geometry]
        where: tuple[Any, ...] = (..., *along, *along)
        return pairs[where]

    first, *others = itertools.product(*map(range, taps))
    total = at(first).clone()
    for tap in others:
        total += at(tap)
    return total
