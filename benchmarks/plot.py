"""The plot: for each network and cell satchel, the best of the others, and the lower bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from report import lower_bound, peers, value

STYLES: dict[str, dict[str, Any]] = {
    "satchel": {"marker": "o", "color": "#1f5fa8", "zorder": 3},
    "best of the others": {"marker": "o", "color": "#d9822b", "zorder": 2},
    "lower bound": {"marker": "|", "color": "#333333", "s": 90, "zorder": 1},
}


def draw(results: dict[str, Any], path: Path, clock: str = "cpu") -> None:
    """Ratios on a logarithmic axis, one panel per network. What has no number is named on the left."""
    networks = results["networks"]
    columns = min(2, len(networks))
    rows = -(-len(networks) // columns)
    heights = [
        max(1.5 + 0.26 * len(cells) for cells in list(networks.values())[row * columns : (row + 1) * columns])
        for row in range(rows)
    ]
    figure = Figure(figsize=(5.5 * columns, sum(heights)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flatten()
    for axis, (network, cells) in zip(axes, networks.items(), strict=False):
        _panel(axis, network, cells, clock)
    for axis in axes[len(networks) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel(f"{'CPU' if clock == 'cpu' else 'elapsed'} time with the features / without", fontsize=9)
    figure.savefig(path, dpi=130)


def _panel(axis: Any, network: str, cells: dict[str, Any], clock: str) -> None:
    series: dict[str, list[tuple[float, int]]] = {name: [] for name in STYLES}
    for row, found in enumerate(cells.values()):
        numbers = {
            "satchel": value(found.get("satchel", {}), clock),
            "best of the others": min(peers(found, clock).values(), default=float("inf")),
            "lower bound": lower_bound(found, clock) or float("inf"),
        }
        for name, number in numbers.items():
            if number != float("inf"):
                series[name].append((number, row))
        if "failed" in found.get("satchel", {}):
            reason = found["satchel"]["failed"][:40]
            axis.annotate(
                f"satchel: {reason}", (0.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=6
            )
    for name, points in series.items():
        axis.scatter(*zip(*points, strict=True) if points else ([], []), label=name, **STYLES[name])
    axis.set_yticks(range(len(cells)), list(cells), fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(0.9, 1.2 * max((number for points in series.values() for number, _ in points), default=10.0))
    axis.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(axis="x", color="#eeeeee", zorder=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title(network, fontsize=10)
