"""Tensors read at affine positions, x[…, s·h + d·a − p, …], zero outside: as windows, and convolved.

The last axes of a tensor, one per stride, are read so. Windows are a strided view where the tensor needs no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .matmul import onednn_speed
from .memory import Out, placed
from .torch_private import has_product, product

#: Places of a kernel up to which batched products of one column are faster than groups, where MKL is slow and where it is fast; elements
#: of a window up to which they are there, as groups of few channels are no full vectors; those from which on several columns go by them.
_FEW, _FAIRLY_FEW = 64, 144
_NARROW = 128
_WIDE = 64
#: Elements of windows that are copied at once.
_COPIED = 1 << 20
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def padded(
    tensor: Tensor,
    places: Sequence[int],
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """[*lead, *spatial] with zeros wherever a window reaches out of it."""
    rank = len(places)
    pads: list[int] = []
    for k in reversed(range(rank)):
        reached = stride[k] * (places[k] - 1) + dilation[k] * (taps[k] - 1) + 1
        pads += [padding[k], max(0, reached - padding[k] - tensor.shape[k - rank])]
    return F.pad(tensor, pads) if any(pads) else tensor


def windows(
    tensor: Tensor,
    places: Sequence[int],
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """[*lead, *spatial] → x[…, s·h + d·a − p] [*lead, *places, *taps]."""
    rank = len(places)
    whole = padded(tensor, places, taps, stride, dilation, padding)
    lead, steps = whole.stride()[:-rank], whole.stride()[-rank:]
    return whole.as_strided(
        (*tensor.shape[:-rank], *places, *taps),
        (
            *lead,
            *(step * s for step, s in zip(steps, stride, strict=True)),
            *(step * d for step, d in zip(steps, dilation, strict=True)),
        ),
        whole.storage_offset(),
    )


def transposed_windows(
    tensor: Tensor,
    places: Sequence[int],
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """[*lead, *spatial] → x[…, (u + p − d·a) / s] [*lead, *places, *taps], zero where that is not an integer."""
    rank = len(places)
    spread = [(size - 1) * s + 1 for size, s in zip(tensor.shape[-rank:], stride, strict=True)]
    stuffed = tensor.new_zeros(*tensor.shape[:-rank], *spread)
    every: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
    stuffed[every] = tensor
    # u + p − d·a = u + d·(A − 1 − a) − (d·(A − 1) − p): taps in reverse order
    before = [d * (count - 1) - p for d, count, p in zip(dilation, taps, padding, strict=True)]
    found = windows(stuffed, places, taps, [1] * rank, dilation, before)
    return found.flip(*range(-rank, 0))


def _images(tensor: Tensor, rank: int, groups: int) -> Tensor:
    """[*lead, G, C, *spatial] → [lead, G·C, *spatial], what torch convolves."""
    lead = tensor.shape[: -rank - 2]
    return tensor.reshape(lead.numel(), groups * tensor.shape[-rank - 1], *tensor.shape[-rank:])


def correlate(
    tensor: Tensor,
    kernel: Tensor,
    places: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """[*lead, G, C, *spatial], [G, O, C, *taps] → Σ_{c,a} kernel[g, o, c, a] x[…, g, c, s·h + d·a − p] [*lead, G, O, *places]."""
    rank, groups = len(stride), kernel.shape[0]
    images = _images(tensor, rank, groups)
    found = _CONVOLVE[rank](images, kernel.flatten(0, 1), None, stride, padding, dilation, groups)
    # An output_padding of a stride or more leaves elements beyond the last place.
    inside: tuple[Any, ...] = (..., *(slice(size) for size in places))
    found = found[inside]
    return found.reshape(*tensor.shape[: -rank - 2], groups, kernel.shape[1], *places)


def correlate_transposed(
    tensor: Tensor,
    kernel: Tensor,
    places: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """[*lead, G, C, *spatial], [G, C, O, *taps] → Σ_{c,a} kernel[g, c, o, a] x[…, g, c, (u + p − d·a) / s] [*lead, G, O, *places]."""
    rank, groups = len(stride), kernel.shape[0]
    images = _images(tensor, rank, groups)
    reached = [
        s * (size - 1) + d * (count - 1) + 1
        for s, size, d, count in zip(stride, images.shape[-rank:], dilation, kernel.shape[-rank:], strict=True)
    ]
    # torch cuts off as much at both ends, and adds less than a stride. What lies beyond is zero, or cut off.
    added = [size + 2 * p - r for size, p, r in zip(places, padding, reached, strict=True)]
    cut = [p if a < s else 0 for a, s, p in zip(added, stride, padding, strict=True)]
    added = [max(0, a) if a < s else 0 for a, s in zip(added, stride, strict=True)]
    found = _TRANSPOSED[rank](images, kernel.flatten(0, 1), None, stride, cut, added, groups, dilation)
    pads: list[int] = []
    for k in reversed(range(rank)):
        pads += [cut[k] - padding[k], places[k] + padding[k] + cut[k] - reached[k] - added[k]]
    if any(pads):
        found = F.pad(found, pads)
    return found.reshape(*tensor.shape[: -rank - 2], groups, kernel.shape[2], *places)


def kernel_gradients(
    tensor: Tensor,
    factor: Tensor,
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    out: Out = None,
) -> Tensor:
    """[N, G, C, *spatial], [V, N, G, O, *places] → Σ_h factor[v, n, g, o, h] x[n, g, c, s·h + d·a − p] [V, N, G, O, C, *taps].

    The gradients of a convolution's kernel, each sample and group by itself. On a CPU one column is a convolution of N·G groups, which
    reads each element once where windows would be copied; they are where products are faster. Computed in `out` where that saves memory.
    """
    if tensor.is_cuda or not factor.numel():
        return _of_windows(tensor, factor, taps, stride, dilation, padding)
    if _batches_pay(len(factor), tensor.shape[2] * prod(taps), prod(factor.shape[4:])):
        V, N, G, O = factor.shape[:4]
        place = placed(out, (V, N, G, O, tensor.shape[2], *taps), tensor.dtype)
        return _of_batches(tensor, factor, taps, stride, dilation, padding, place)
    if len(factor) > 1 and has_product(factor, tensor):
        return _of_products(tensor, factor, taps, stride, dilation, padding)
    return _of_groups(tensor, factor, taps, stride, dilation, padding)


def _of_windows(
    tensor: Tensor,
    factor: Tensor,
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    places = factor.shape[4:]
    patches = windows(tensor, places, taps, stride, dilation, padding).flatten(3, 2 + len(places)).flatten(4)
    found = torch.einsum("ngcha,vngoh->vngoca", patches, factor.flatten(4))
    return found.reshape(*found.shape[:-1], *taps)


def _batches_pay(columns: int, window: int, places: int) -> bool:
    """Whether products by sample of so many columns with windows of so many elements are the fastest."""
    if onednn_speed() >= 1:
        return columns == 1 and places <= _FEW
    return places <= _FAIRLY_FEW or window <= _NARROW if columns == 1 else window >= _WIDE


def _of_batches(
    tensor: Tensor,
    factor: Tensor,
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    out: Tensor | None,
) -> Tensor:
    V, N, G, O, *places = factor.shape
    C, T = tensor.shape[2], prod(places)
    if not (out is not None and out.is_contiguous() and 1 in (V, N * G)):  # products by sample lie otherwise
        out = None
    most = max(1, _COPIED // max(1, G * C * prod(taps) * T))
    if most < N:
        parts = [
            _of_batches(
                tensor[some], factor[:, some], taps, stride, dilation, padding, None if out is None else out[:, some]
            )
            for some in (slice(first, first + most) for first in range(0, N, most))
        ]
        return torch.cat(parts, 1) if out is None else out
    rows = _by_tap(windows(tensor, places, taps, stride, dilation, padding), len(taps)).reshape(N * G, -1, T)
    columns = factor.movedim(0, 2).reshape(N * G, V * O, T)
    found = torch.bmm(columns, rows.mT, out=None if out is None else out.view(N * G, V * O, C * prod(taps)))
    return found.view(N, G, V, O, C, *taps).movedim(2, 0) if out is None else out


def _by_tap(patches: Tensor, rank: int) -> Tensor:
    """[N, G, C, *places, *taps] → [N, G, C, *taps, *places]."""
    return patches.movedim(tuple(range(-rank, 0)), tuple(range(3, 3 + rank)))


def _of_products(
    tensor: Tensor,
    factor: Tensor,
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    V, N, G, O, *places = factor.shape
    C, T = tensor.shape[2], prod(places)
    by_tap = _by_tap(windows(tensor, places, taps, stride, dilation, padding), len(taps))
    found = [
        product(factor[:, n, g].reshape(V * O, T), by_tap[n, g].reshape(C * prod(taps), T)).view(V, O, C, *taps)
        for n in range(N)
        for g in range(G)
    ]
    joined = found[0][None] if len(found) == 1 else torch.stack(found)
    return joined.unflatten(0, (N, G)).movedim(2, 0)


def _of_groups(
    tensor: Tensor,
    factor: Tensor,
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    V, N, G, O, *places = factor.shape
    C, rank = tensor.shape[2], len(taps)
    reached = [s * (h - 1) + d * (a - 1) + 1 for h, a, s, d in zip(places, taps, stride, dilation, strict=True)]
    given = [x + 2 * p for x, p in zip(tensor.shape[3:], padding, strict=True)]
    if any(not r <= g < r + s for r, g, s in zip(reached, given, stride, strict=True)):  # torch would find other places
        pads = [(p, max(0, r - g + p)) for r, g, p in zip(reached, given, padding, strict=True)]
        inside: tuple[Any, ...] = (..., *(slice(r) for r in reached))
        tensor, padding = F.pad(tensor, [end for pair in reversed(pads) for end in pair])[inside], [0] * rank
    images = tensor.reshape(1, N * G * C, *tensor.shape[3:])
    gradients = factor.movedim(0, 2).reshape(1, N * G * V * O, *places)
    kernel = tensor.new_empty(N * G * V * O, C, *taps)
    found = torch.ops.aten.convolution_backward(
        gradients, images, kernel, None, stride, padding, dilation, False, [0] * rank, N * G, [False, True, False]
    )[1]
    return found.reshape(N, G, V, O, C, *taps).movedim(2, 0)


def transposed_kernel_gradients(
    tensor: Tensor,
    factor: Tensor,
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """[N, G, C, *spatial], [V, N, G, O, *places] → Σ_u factor[v, n, g, o, u] x[n, g, c, (u + p − d·a) / s] [V, N, G, C, O, *taps].

    The factor is what the kernel of the adjoint reads: u = s·h + d·a − p.
    """
    V, N, G, O, *places = factor.shape
    images = factor.movedim(0, 2).reshape(N, G, V * O, *places)
    found = kernel_gradients(images, tensor[None], taps, stride, dilation, padding)
    return found.reshape(N, G, tensor.shape[2], V, O, *taps).movedim(3, 0)
