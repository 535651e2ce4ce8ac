"""Modules without parameters that are piecewise linear, with any options, between layers: against dense autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import Case, Network, projection
from conftest import DEFINITIONS, EXACT, Agree, Pass, module_class

DRAWN = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
RANKS = st.sampled_from([1, 1, 2, 2, 3])
COVERED = {module_class(definition) for definition in DEFINITIONS.passing}


def check(build: Callable[[], nn.Module], shape: tuple[int, ...], agree: Agree) -> None:
    """A Linear below, parameters above."""
    probe = torch.zeros(1, *shape[1:])

    def network() -> nn.Module:
        module = build()
        return nn.Sequential(nn.Linear(shape[-1], shape[-1]), module, projection(module, probe), nn.Linear(3, 2))

    case = Case(Network("drawn", network, shape), nn.CrossEntropyLoss, "mean")
    reference = case.reference()
    done = Pass(case, torch.float64, "aten", *(feature() for feature in EXACT))
    for feature in EXACT:
        agree(done.fields(feature), {name: reference.field(feature.__name__, name) for name in reference.parameters})


def check_if_valid(build: Callable[[], nn.Module], shape: tuple[int, ...], agree: Agree) -> None:
    """Options as drawn, within torch's own limits.

    (A window of MaxPool whose dilated taps all lie outside gives −inf, and torch's backward writes out of bounds.)
    """
    try:
        output = build()(torch.zeros(1, *shape[1:]))
    except (RuntimeError, ValueError):
        output = torch.zeros(0)
    assume(0 < output.numel() <= 150 and bool(output.isfinite().all()))
    check(build, shape, agree)


def sizes(data: st.DataObject, rank: int, low: int = 1) -> tuple[int, ...]:
    most = {1: 6, 2: 4, 3: 3}[rank]
    return tuple(data.draw(st.integers(low, max(low, most)), "size") for _ in range(rank))


def shape_of(data: st.DataObject, rank: int, low: int = 1) -> tuple[int, ...]:
    return (data.draw(st.integers(1, 3), "batch"), data.draw(st.integers(1, 2), "channels"), *sizes(data, rank, low))


def numbers(data: st.DataObject, rank: int, low: int, high: int, name: str) -> tuple[int, ...]:
    return tuple(data.draw(st.integers(low, high), name) for _ in range(rank))


@DRAWN
@given(data=st.data())
def test_pooling(data: st.DataObject, agree: Agree) -> None:
    kind, rank = data.draw(st.sampled_from(["Max", "Avg"]), "kind"), data.draw(RANKS, "rank")
    kernel = numbers(data, rank, 1, 3, "kernel")
    options: dict[str, Any] = {"kernel_size": kernel, "stride": numbers(data, rank, 1, 3, "stride")}
    options["padding"] = tuple(data.draw(st.integers(0, k // 2), "padding") for k in kernel)
    options["ceil_mode"] = data.draw(st.booleans(), "ceil_mode")
    if kind == "Max":
        # Dilated and padded, a window can lie in the padding alone: torch reads outside its input then.
        options["dilation"] = 1 if any(options["padding"]) else numbers(data, rank, 1, 2, "dilation")
    else:
        options["count_include_pad"] = data.draw(st.booleans(), "count_include_pad")
        if rank > 1:
            options["divisor_override"] = data.draw(st.sampled_from([None, 1, 5]), "divisor_override")
    check_if_valid(lambda: getattr(nn, f"{kind}Pool{rank}d")(**options), shape_of(data, rank), agree)


@DRAWN
@given(data=st.data())
def test_adaptive_pooling(data: st.DataObject, agree: Agree) -> None:
    """Sizes that do not divide, and more places than elements."""
    kind, rank = data.draw(st.sampled_from(["Max", "Avg"]), "kind"), data.draw(RANKS, "rank")
    wanted: Any = tuple(data.draw(st.sampled_from([1, 2, 3, 4, None]), "places") for _ in range(rank))
    wanted = wanted if rank > 1 else wanted[0] or 5
    check_if_valid(lambda: getattr(nn, f"Adaptive{kind}Pool{rank}d")(wanted), shape_of(data, rank), agree)


@DRAWN
@given(data=st.data())
def test_padding(data: st.DataObject, agree: Agree) -> None:
    kind = data.draw(st.sampled_from(["Zero", "Constant", "Reflection", "Replication", "Circular"]), "kind")
    rank = data.draw(RANKS, "rank")
    low = -1 if kind in ("Zero", "Constant") else 0
    widths = numbers(data, 2 * rank, low, 2, "width")
    more = (0.7,) if kind == "Constant" else ()
    check_if_valid(lambda: getattr(nn, f"{kind}Pad{rank}d")(widths, *more), shape_of(data, rank, low=2), agree)


MODES = {1: ["nearest", "linear", "nearest-exact"], 2: ["nearest", "bilinear", "bicubic"], 3: ["nearest", "trilinear"]}


@DRAWN
@given(data=st.data())
def test_upsampling(data: st.DataObject, agree: Agree) -> None:
    rank = data.draw(RANKS, "rank")
    options: dict[str, Any] = {"mode": data.draw(st.sampled_from(MODES[rank]), "mode")}
    if "linear" in options["mode"] or options["mode"] == "bicubic":
        options["align_corners"] = data.draw(st.booleans(), "align_corners")
    if data.draw(st.booleans(), "to a size"):
        options["size"] = numbers(data, rank, 1, 4, "places")
    else:
        options["scale_factor"] = tuple(data.draw(st.sampled_from([0.5, 1.0, 1.6, 2.0]), "scale") for _ in range(rank))
    check_if_valid(lambda: nn.Upsample(**options), shape_of(data, rank), agree)


@DRAWN
@given(data=st.data())
def test_rearranging(data: st.DataObject, agree: Agree) -> None:
    r, h, w = numbers(data, 3, 1, 3, "extent")
    N = data.draw(st.integers(1, 3), "batch")
    builds: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
        (lambda: nn.PixelShuffle(r), (N, r * r, h, w)),
        (lambda: nn.PixelUnshuffle(r), (N, 1, r * h, r * w)),
        (lambda: nn.ChannelShuffle(r), (N, r * h, w)),
        (lambda: nn.Unflatten(1, (r, h)), (N, r * h)),
        (lambda: nn.Unflatten(-1, (h, r)), (N, 2, r * h)),
        (lambda: nn.Flatten(data_dims[0], data_dims[1]), (N, r, h, w)),
        (lambda: nn.Identity(), (N, r, h)),
    ]
    data_dims = data.draw(st.sampled_from([(1, 2), (1, -1), (2, 3), (-2, -1)]), "dims")
    build, shape = builds[data.draw(st.integers(0, len(builds) - 1), "module")]
    check_if_valid(build, shape, agree)


DROPOUTS = [
    (nn.Dropout, (3, 4)),
    (nn.Dropout1d, (3, 4)),
    (nn.Dropout2d, (3, 2, 2)),
    (nn.Dropout3d, (3, 2, 1, 2)),
    (nn.AlphaDropout, (3, 4)),
    (nn.FeatureAlphaDropout, (3, 4)),
]


@pytest.mark.parametrize("layer,shape", DROPOUTS)
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_dropout(layer: Any, shape: tuple[int, ...], p: float, training: bool, agree: Agree) -> None:
    """The mask is the forward's: nothing is drawn anew. (A pre-hook seeds it, so that the reference draws the same.)"""
    drawn: list[Tensor] = []

    def build() -> nn.Module:
        module = layer(p).train(training)
        module.register_forward_pre_hook(lambda m, args: torch.manual_seed(5) and None)
        module.register_forward_hook(lambda m, args, output: drawn.append(output.detach() == 0))
        return module

    with torch.random.fork_rng():
        check(build, (4, *shape), agree)
    assert not training or p == 0 or layer in (nn.AlphaDropout, nn.FeatureAlphaDropout) or any(m.any() for m in drawn)


@pytest.mark.parametrize("layer", [nn.Dropout, nn.ReLU, nn.Hardtanh, nn.ELU], ids=lambda layer: layer.__name__)
def test_inplace(layer: Any, agree: Agree) -> None:
    """On the output of a layer, which nobody else reads."""

    def build() -> nn.Module:
        module = layer(inplace=True)
        module.register_forward_pre_hook(lambda m, args: torch.manual_seed(5) and None)
        return module

    with torch.random.fork_rng():
        check(build, (4, 3, 2), agree)


def test_every_passing_module_is_here() -> None:
    named = {getattr(nn, f"{kind}{rank}d") for rank in (1, 2, 3) for kind in KINDS}
    rest = {nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unflatten, nn.Upsample, *(d for d, _ in DROPOUTS)}
    assert named | rest >= COVERED, COVERED - named - rest


KINDS = [
    "MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad",
    "CircularPad",
]  # fmt: skip
