"""The figure of the digits example: loss against steps, gradient signal-to-noise and curvature per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's palette, distinguishable with any colour vision; line styles differ too.
OPTIMIZER_STYLES = {"KFAC": ("#0072B2", "-"), "Adam": ("#D55E00", (0, (5, 1.5))), "SGD": ("#767676", (0, (1.5, 1.2)))}
LAYER_STYLES = (("#C98A00", "-"), ("#009E73", (0, (5, 1.5))), ("#7B4FA3", (0, (1.5, 1.2))))
INK, FAINT = "#222222", "#DDDDDD"


def draw(
    path: Path,
    losses: Mapping[str, Sequence[Sequence[float]]],
    signal_to_noise: Mapping[str, Sequence[float]],
    curvature: Mapping[str, Tensor],
) -> None:
    """Write the three panels to `path`."""
    style = {
        "font.size": 10.5,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with plt.rc_context(style):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.3), layout="constrained")
        _losses(left, losses)
        _signal_to_noise(middle, signal_to_noise)
        _curvature(right, curvature)
        figure.get_layout_engine().set(w_pad=0.12)  # type: ignore[union-attr]
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _losses(axes: Axes, losses: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """The median run of each optimizer, and the range over its seeds."""
    for name, runs in losses.items():
        values = np.asarray(runs)
        steps, (colour, dashes) = np.arange(values.shape[1]), OPTIMIZER_STYLES[name]
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, np.median(values, 0), color=colour, linestyle=dashes, linewidth=2)
        axes.annotate(
            name,
            (steps[-1], np.median(values[:, -1])),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            weight="bold",
        )
    axes.set(title="Training loss", xlabel="step", ylabel="cross-entropy, whole training set", yscale="log")
    axes.margins(x=0)


def _signal_to_noise(axes: Axes, ratios: Mapping[str, Sequence[float]]) -> None:
    for index, (name, values) in enumerate(ratios.items()):
        colour, dashes = LAYER_STYLES[index]
        axes.plot(values, color=colour, linestyle=dashes, linewidth=2, label=f"layer {index + 1} ({name})")
    axes.set(
        title="Gradient signal-to-noise, along KFAC's run", xlabel="step", ylabel="‖mean gₙ‖² / Σ var gₙ", yscale="log"
    )
    axes.margins(x=0)
    axes.legend(frameon=False, handlelength=2.2)


def _curvature(axes: Axes, curvature: Mapping[str, Tensor]) -> None:
    """One histogram above the other; entries that are exactly zero (pixels that are always blank) have no place on a log axis."""
    positive = {name: values[values > 0].numpy() for name, values in curvature.items()}
    everything = np.concatenate(list(positive.values()))
    edges = np.geomspace(np.quantile(everything, 0.002), everything.max(), 50)
    for row, (name, values) in enumerate(reversed(positive.items())):
        layer, base = len(positive) - 1 - row, 1.2 * row
        colour, _ = LAYER_STYLES[layer]
        heights, _ = np.histogram(values, edges)
        axes.stairs(base + heights / heights.max(), edges, baseline=base, fill=True, color=colour, alpha=0.85)
        axes.axhline(base, color=colour, linewidth=1)
        axes.annotate(
            f"layer {layer + 1}\n{name}",
            (0, base),
            (6, 5),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=colour,
            weight="bold",
        )
    axes.set(
        title="Curvature at initialisation",
        xlabel="Gauss–Newton diagonal",
        ylabel="weights (scaled to the peak)",
        xscale="log",
    )
    axes.set_xlim(edges[0] / (edges[-1] / edges[0]) ** 0.3, edges[-1] * 1.2)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
