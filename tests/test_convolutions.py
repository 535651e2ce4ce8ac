"""Convolutions with any options, against dense autograd and factors of patches that torch's own module gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import Case, Network, Wired, projection
from conftest import EXACT, Agree, Pass
from satchel.registry import REGISTRY
from satchel.runtime import window_gram, windows
from satchel.runtime.place_gram import place_gram

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Relative error in float64. What is drawn may cancel: 1.7e-10 was seen of an entry of 2e-8 that differences of weights leave.
CANCELLED = 1e-9
DRAWN = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def numbers(rank: int, low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(low, high)] * rank)


def of(build: Any, shape: tuple[int, ...], layout: str) -> Network:
    """A convolution with parameters above and below. Layout: of the input, and so of what torch computes."""

    def wire(m: Any, x: Tensor) -> Tensor:
        if layout == "channels last" and len(shape) == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return m.head(m.mix(m.conv(m.first(x))))

    def network() -> nn.Module:
        conv = build()
        mix = projection(conv, torch.zeros(1, *shape[1:]))
        return Wired(wire, first=nn.Linear(shape[-1], shape[-1]), conv=conv, mix=mix, head=nn.Linear(3, 2))

    return Network("drawn", network, shape, strided=layout == "strided")


def check(network: Network, agree: Agree) -> None:
    case = Case(network, nn.MSELoss, "mean")
    reference = case.reference()
    done = Pass(case, torch.float64, "aten", *(feature() for feature in EXACT))
    for feature in EXACT:
        wanted = {name: reference.field(feature.__name__, name) for name in reference.parameters}
        agree(done.fields(feature), wanted, tolerance=CANCELLED)
    agree(done.gradients(), {name: g.sum(0) for name, g in reference.gradients.items()}, tolerance=CANCELLED)


@pytest.mark.parametrize("speed", [0.85, 1.1])
@DRAWN
@given(data=st.data())
def test_kernel_gradients_by_groups_and_by_products_are_those_of_windows(
    speed: float, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the places are, also such that torch would find others: three ways for CPUs, which of these is the fastest as oneDNN
    is, and one for GPUs. Windows are copied for some samples at once."""
    monkeypatch.setattr(windows, "onednn_speed", lambda: speed)
    monkeypatch.setattr(windows, "_COPIED", data.draw(st.sampled_from([1, 50, 1 << 20]), "copied"))
    monkeypatch.setattr(windows, "_WIDE", data.draw(st.sampled_from([1, 1 << 20]), "wide"))
    rank = data.draw(st.integers(1, 3), "rank")
    places, taps, stride = (data.draw(numbers(rank, 1, high), name) for name, high in (("h", 4), ("a", 3), ("s", 3)))
    dilation, padding = data.draw(numbers(rank, 1, 2), "d"), data.draw(numbers(rank, 0, 2), "p")
    more = data.draw(numbers(rank, -1, 3), "more")
    V, N, G, C, O = data.draw(st.tuples(*[st.integers(1, 3)] * 5), "V, N, G, C, O")
    geometry = zip(places, taps, stride, dilation, padding, more, strict=True)
    spatial = [max(1, s * (h - 1) + d * (a - 1) + 1 - 2 * p + m) for h, a, s, d, p, m in geometry]
    x, factor = (torch.randn(shape, dtype=torch.float64) for shape in ((N, G, C, *spatial), (V, N, G, O, *places)))
    one, other = (way(x, factor, taps, stride, dilation, padding) for way in (windows._of_groups, windows._of_windows))
    torch.testing.assert_close(one, other)
    single = windows._of_products(x.float(), factor.float(), taps, stride, dilation, padding)
    torch.testing.assert_close(single, one.float(), rtol=1e-4, atol=1e-4)
    batched = windows._of_batches(x, factor, taps, stride, dilation, padding, None)
    torch.testing.assert_close(batched, one)
    for columns in {1, V}:
        room = torch.full((V, N + 1, *one.shape[2:]), torch.nan, dtype=torch.float64)
        for v in range(0, V, columns):
            some = slice(v, v + columns)
            place = room[some, :N]
            found = windows.kernel_gradients(x, factor[some], taps, stride, dilation, padding, out=place)
            torch.testing.assert_close(found, one[some])
            assert found.data_ptr() == place.data_ptr() or place.isnan().all()
        assert room[:, N:].isnan().all()


@DRAWN
@given(data=st.data())
def test_products_of_windows_at_two_places_are_those_of_the_windows(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3), "rank")
    places, taps, stride = (data.draw(numbers(rank, 1, high), name) for name, high in (("h", 4), ("a", 3), ("s", 3)))
    dilation, padding = data.draw(numbers(rank, 1, 2), "d"), data.draw(numbers(rank, 0, 2), "p")
    more = data.draw(numbers(rank, -1, 3), "more")
    N, G, C = data.draw(st.tuples(*[st.integers(1, 3)] * 3), "N, G, C")
    geometry = zip(places, taps, stride, dilation, padding, more, strict=True)
    x = torch.randn(
        N, G, C, *(max(1, s * (h - 1) + d * (a - 1) + 1 - 2 * p + m) for h, a, s, d, p, m in geometry)
    ).double()
    patches = windows.windows(x, places, taps, stride, dilation, padding).flatten(3 + rank).flatten(3, 2 + rank)
    want = torch.einsum("ngcha,ngcHa->nghH", patches, patches)
    found = place_gram(x, places, taps, stride, dilation, padding)
    torch.testing.assert_close(found.flatten(2, 1 + rank).flatten(3), want)


@DRAWN
@given(data=st.data())
def test_transposed_correlation_is_the_product_with_transposed_windows(data: st.DataObject) -> None:
    """Whatever the places are, also more or fewer than torch would find."""
    rank = data.draw(st.integers(1, 3), "rank")
    places, taps, stride = (data.draw(numbers(rank, 1, high), name) for name, high in (("h", 4), ("a", 3), ("s", 3)))
    dilation = data.draw(numbers(rank, 1, 2), "d")
    reach = [d * (a - 1) for a, d in zip(taps, dilation, strict=True)]
    padding = tuple(data.draw(st.integers(0, min(2, r)), "p") for r in reach)
    more = data.draw(numbers(rank, -1, 4), "more")
    least = [s * (h - 1) + r + 1 - 2 * p for h, s, r, p in zip(places, stride, reach, padding, strict=True)]
    assume(min(least) > 0)  # a module has such places
    spatial = [max(1, low + m) for low, m in zip(least, more, strict=True)]
    V, N, G, C, O = data.draw(st.tuples(*[st.integers(1, 3)] * 5), "V, N, G, C, O")
    factor = torch.randn(V, N, G, C, *places, dtype=torch.float64)
    kernel = torch.randn(G, C, O, *taps, dtype=torch.float64)
    patches = windows.transposed_windows(factor, spatial, taps, stride, dilation, padding)
    want = torch.einsum("vngcua,gcoa->vngou", patches.flatten(4 + rank).flatten(4, 3 + rank), kernel.flatten(3))
    for dtype in (torch.float64, torch.float32):
        found = windows.correlate_transposed(factor.to(dtype), kernel.to(dtype), spatial, stride, dilation, padding)
        torch.testing.assert_close(found.flatten(4), want.to(dtype), rtol=1e-4, atol=1e-4)


@DRAWN
@given(data=st.data())
def test_second_moments_by_displacement_are_those_of_windows(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3), "rank")
    places, taps = data.draw(numbers(rank, 1, 5), "h"), data.draw(numbers(rank, 1, 3), "a")
    dilation, padding = data.draw(numbers(rank, 1, 2), "d"), data.draw(numbers(rank, 0, 2), "p")
    more = data.draw(numbers(rank, 0, 2), "more")
    N, G, C = data.draw(st.tuples(*[st.integers(1, 3)] * 3), "N, G, C")
    geometry = zip(places, taps, dilation, padding, more, strict=True)
    x = torch.randn(N, G, C, *(max(1, h + d * (a - 1) - 2 * p + m) for h, a, d, p, m in geometry), dtype=torch.float64)
    one = window_gram.by_displacement(x, places, taps, dilation, padding)
    torch.testing.assert_close(one, window_gram.by_windows(x, places, taps, (1,) * rank, dilation, padding))


LAYOUTS = st.sampled_from(["contiguous", "strided", "channels last"])


@DRAWN
@given(data=st.data())
def test_convolution(data: st.DataObject, agree: Agree) -> None:
    """Stride, padding in numbers or words, what stands outside, dilation, groups up to one per channel."""
    rank = data.draw(st.sampled_from([1, 1, 2, 2, 3]), "rank")
    kernel, dilation = (
        data.draw(numbers(rank, 1, 3 if rank < 3 else 2), "kernel"),
        data.draw(numbers(rank, 1, 2), "dilation"),
    )
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = tuple(r + data.draw(st.integers(0, 4 - rank), "more") for r in reach)
    padding: Any = data.draw(st.sampled_from(["same", "valid", "numbers"]), "padding")
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]), "mode")
    if mode == "reflect" and (rank == 3 or padding == "same"):
        mode = "replicate"
    stride = (1,) * rank if padding == "same" else data.draw(numbers(rank, 1, 3), "stride")
    if padding == "numbers":
        limits = [size - 1 if mode == "reflect" else min(size, 2) for size in sizes]
        padding = tuple(data.draw(st.integers(0, min(limit, 2)), "pad") for limit in limits)
    groups = data.draw(st.integers(1, 3), "groups")
    inner, outer = (groups * data.draw(st.integers(1, 2), name) for name in ("inner", "outer"))
    options: dict[str, Any] = {"groups": groups, "bias": data.draw(st.booleans(), "bias"), "padding_mode": mode}
    options |= {"stride": stride, "padding": padding, "dilation": dilation}
    shape = (data.draw(st.integers(1, 3), "batch"), inner, *sizes)
    build = lambda: CONVOLUTIONS[rank - 1](inner, outer, kernel, **options)  # noqa: E731
    check(of(build, shape, data.draw(LAYOUTS, "layout")), agree)


class Sized(nn.Module):
    """A transposed convolution that is told the size of its output."""

    def __init__(self, conv: nn.Module, size: tuple[int, ...]) -> None:
        super().__init__()
        self.conv, self.size = conv, size

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, output_size=self.size)


@DRAWN
@given(data=st.data())
def test_transposed_convolution(data: st.DataObject, agree: Agree) -> None:
    """Stride, padding, output_padding or output_size, dilation, groups."""
    rank = data.draw(st.sampled_from([1, 1, 2, 2, 3]), "rank")
    kernel, dilation = (
        data.draw(numbers(rank, 1, 3 if rank < 3 else 2), "kernel"),
        data.draw(numbers(rank, 1, 2), "dilation"),
    )
    stride, sizes = (
        data.draw(numbers(rank, 1, 3 if rank < 3 else 2), "stride"),
        data.draw(numbers(rank, 1, 4 - rank // 2), "sizes"),
    )
    extra = tuple(data.draw(st.integers(0, max(s, d) - 1), "extra") for s, d in zip(stride, dilation, strict=True))
    full = [s * (size - 1) + d * (k - 1) + 1 for s, size, d, k in zip(stride, sizes, dilation, kernel, strict=True)]
    padding = tuple(data.draw(st.integers(0, min(2, (f - 1) // 2)), "pad") for f in full)
    groups = data.draw(st.integers(1, 3), "groups")
    inner, outer = (groups * data.draw(st.integers(1, 2), name) for name in ("inner", "outer"))
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options["bias"] = data.draw(st.booleans(), "bias")
    shape = (data.draw(st.integers(1, 3), "batch"), inner, *sizes)
    if data.draw(st.booleans(), "told"):
        told = tuple(f - 2 * p + min(e, s - 1) for f, p, e, s in zip(full, padding, extra, stride, strict=True))
        build: Any = lambda: Sized(TRANSPOSED[rank - 1](inner, outer, kernel, **options), told)  # noqa: E731
        network = of(build, shape, data.draw(LAYOUTS, "layout"))
    else:
        build = lambda: TRANSPOSED[rank - 1](inner, outer, kernel, output_padding=extra, **options)  # noqa: E731
        network = of(build, shape, data.draw(LAYOUTS, "layout"))
    check(network, agree)


def test_every_convolution_is_drawn() -> None:
    convolving = {layer.module for layer in REGISTRY.layers if layer.name.startswith("Conv")}
    assert convolving == {*CONVOLUTIONS, *TRANSPOSED}
