"""Second moments of windows: Σ_{n,h} x[n, g, c, s·h + d·a − p] x[n, g, c′, s·h + d·b − p], the input factor of a convolution.

Where the stride is 1, pairs of taps (a, b) of one displacement b − a are the same products, summed over places that differ at the
borders alone: Σ_u x[u] x[u + d·(b − a)], u in a box that begins at d·a. So one product per displacement, in pieces of which the
boxes of all taps are made, replaces one per pair: 13 for the 81 of a 3 × 3 kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import reduce
from math import prod
from operator import add
from typing import Any

import torch
from torch import Tensor

from .memory import Out, placed_or_new
from .symmetric import gram
from .windows import padded, windows

#: Below, the products are too narrow to gain by being fewer.
_CHANNELS = 16


def window_gram(
    tensor: Tensor,
    places: Sequence[int],
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    over: int = 1,
    out: Out = None,
) -> Tensor:
    """[N, G, C, *spatial] → [G, C, *taps, C, *taps], divided; computed in `out` where that saves memory."""
    products = prod(h + d * (a - 1) for h, a, d in zip(places, taps, dilation, strict=True)) * _displacements(taps)
    enough = tensor.shape[2] >= _CHANNELS and 2 * products < prod(places) * prod(taps) ** 2
    if enough and all(s == 1 for s in stride):
        return by_displacement(tensor, places, taps, dilation, padding, over, out)
    return by_windows(tensor, places, taps, stride, dilation, padding, over, out)


def by_windows(
    tensor: Tensor,
    places: Sequence[int],
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    over: int = 1,
    out: Out = None,
) -> Tensor:
    """By one product of all windows: any stride."""
    N, G, C = tensor.shape[:3]
    patches = windows(tensor, places, taps, stride, dilation, padding)
    taps_first = patches.movedim(0, 2).movedim(tuple(range(-len(taps), 0)), tuple(range(2, 2 + len(taps))))
    columns = taps_first.reshape(G, C * prod(taps), N * prod(places))
    grams = [gram(some.mT, over, out if G == 1 else None) for some in columns]
    return (grams[0] if G == 1 else torch.stack(grams)).reshape(G, C, *taps, C, *taps)


def _displacements(taps: Sequence[int]) -> int:
    """Up to the sign."""
    return (prod(2 * a - 1 for a in taps) + 1) // 2


def by_displacement(
    tensor: Tensor,
    places: Sequence[int],
    taps: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    over: int = 1,
    out: Out = None,
) -> Tensor:
    """By one product per displacement of two taps: stride 1."""
    G, C = tensor.shape[1:3]
    whole = padded(tensor, places, taps, (1,) * len(taps), dilation, padding)
    last_first = whole.movedim(
        (0, 2), (-2, -1)
    ).contiguous()  # [G, *spatial, N, C]: any range of the last axis is one matrix
    result = placed_or_new(out, (G, C, *taps, C, *taps), tensor)
    zero = (0,) * len(taps)
    for displacement in itertools.product(*(range(1 - a, a) for a in taps)):
        if displacement < zero:
            continue
        starts = [range(max(0, -k), a - max(0, k)) for a, k in zip(taps, displacement, strict=True)]
        for g in range(G):
            for a, total in _boxes(last_first[g], displacement, starts, places, dilation):
                b = tuple(i + k for i, k in zip(a, displacement, strict=True))
                here: tuple[Any, ...] = (g, slice(None), *a, slice(None), *b)
                mirrored: tuple[Any, ...] = (g, slice(None), *b, slice(None), *a)
                result[here] = total
                if displacement != zero:
                    result[mirrored] = total.mT
    return result if over == 1 else result.div_(over)


def _boxes(
    x: Tensor, displacement: Sequence[int], starts: Sequence[range], places: Sequence[int], dilation: Sequence[int]
) -> list[tuple[tuple[int, ...], Tensor]]:
    """For each tap a of `starts`, Σ_u x[u] x[u + d·k] over the box of extents `places` at d·a. x: [*spatial, N, C]."""
    C = x.shape[-1]
    *outer, (k, tap, extent, d) = zip(displacement, starts, places, dilation, strict=True)
    # Places of the outer axes one by one, the last axis in the pieces between the ends of all boxes.
    rows = [slice(d_ * t[0], d_ * t[-1] + h) for _, t, h, d_ in outer]
    shifted = [slice(r.start + d_ * k_, r.stop + d_ * k_) for r, (k_, _, _, d_) in zip(rows, outer, strict=True)]
    ends = sorted({d * t + e for t in tap for e in (0, extent)})
    left, right = x[tuple(rows)], x[tuple(shifted)]
    pieces = []
    for first, end in itertools.pairwise(ends):
        one = left.narrow(-3, first, end - first).flatten(-3, -2)
        other = right.narrow(-3, first + d * k, end - first).flatten(-3, -2)
        product = one.flatten(0, -3).mT @ other.flatten(0, -3) if outer else (one.mT @ other)[None]
        pieces.append((first, product.reshape(*left.shape[: len(outer)], C, C)))
    found = []
    for last in tap:
        inside = [product for first, product in pieces if d * last <= first < d * last + extent]
        total = reduce(add, inside)
        for others in itertools.product(*(t for _, t, _, _ in outer)):
            box = tuple(
                slice(d_ * (a - t[0]), d_ * (a - t[0]) + h) for a, (_, t, h, d_) in zip(others, outer, strict=True)
            )
            found.append(((*others, last), total[box].flatten(0, -3).sum(0) if outer else total))
    return found
