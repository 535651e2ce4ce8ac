"""torch.nn's pooling over 1, 2 and 3 axes: means and maxima of windows. Linear, given which element is the largest."""

from collections.abc import Mapping
from typing import Any

from satchel_gen.definitions import Example, Passing

SHAPE = (2, 5, 4, 3)


def pooling(kind: str, rank: int, formula: str, *options: Mapping[str, Any]) -> Passing:
    """The module over `rank` axes, with an example for each choice of options."""
    shape = SHAPE[: rank + 1]
    return Passing(f"{kind}Pool{rank}d", formula, examples=tuple(Example(shape, given) for given in options))


MEAN = "output[n, c, h…] = 1/|window| Σ_a input[n, c, s·h + a − p, …]"
MAXIMUM = "output[n, c, h…] = max_a input[n, c, s·h + d·a − p, …]"
ADAPTIVE = "windows of an axis: from ⌊h·I/H⌋ to ⌈(h + 1)·I/H⌉"

AVG_POOL1D, AVG_POOL2D, AVG_POOL3D = (
    pooling(
        "Avg", rank, MEAN, {"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
        {"kernel_size": 2, "stride": 1, "padding": 1, "count_include_pad": False},
    )
    for rank in (1, 2, 3)
)  # fmt: skip
MAX_POOL1D, MAX_POOL2D, MAX_POOL3D = (
    pooling("Max", rank, MAXIMUM, {"kernel_size": 2}, {"kernel_size": 2, "stride": 1, "dilation": 2, "padding": 1, "ceil_mode": True})
    for rank in (1, 2, 3)
)  # fmt: skip
ADAPTIVE_AVG_POOL1D, ADAPTIVE_AVG_POOL2D, ADAPTIVE_AVG_POOL3D = (
    pooling("AdaptiveAvg", rank, f"{MEAN}; {ADAPTIVE}", {"output_size": 1}, {"output_size": (3, 3, 2)[:rank]})
    for rank in (1, 2, 3)
)
ADAPTIVE_MAX_POOL1D, ADAPTIVE_MAX_POOL2D, ADAPTIVE_MAX_POOL3D = (
    pooling("AdaptiveMax", rank, f"{MAXIMUM}; {ADAPTIVE}", {"output_size": 1}, {"output_size": (3, 3, 2)[:rank]})
    for rank in (1, 2, 3)
)
