"""The figure of the digits example: loss against steps, gradient signal-to-noise and curvature per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's palette, distinguishable with any colour vision; line styles differ too.
DASHED, DOTTED = (0, (5, 1.5)), (0, (1.5, 1.2))
OPTIMIZER_STYLES = {"KFAC": ("#0072B2", "-"), "Adam": ("#D55E00", DASHED), "SGD": ("#767676", DOTTED)}
LAYER_STYLES = (("#C98A00", "-"), ("#009E73", DASHED), ("#7B4FA3", DOTTED))
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "figure.constrained_layout.w_pad": 0.12,
}


def draw(
    path: Path,
    losses: Mapping[str, Sequence[Sequence[float]]],
    signal_to_noise: Mapping[str, Sequence[float]],
    curvature: Mapping[str, Tensor],
) -> None:
    """Write the three panels to `path`."""
    plt.rcParams.update(STYLE)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.3), layout="constrained")
    _losses(left, losses)
    _signal_to_noise(middle, signal_to_noise)
    _curvature(right, curvature)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _losses(axes: Axes, losses: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """The median run of each optimizer, and the range over its seeds."""
    for name, runs in losses.items():
        values = np.asarray(runs)
        steps, (colour, dashes) = np.arange(values.shape[1]), OPTIMIZER_STYLES[name]
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, np.median(values, 0), color=colour, linestyle=dashes, linewidth=2)
        end = (steps[-1], np.median(values[:, -1]))
        axes.annotate(name, end, (6, 0), textcoords="offset points", va="center", color=colour, weight="bold")
    axes.set(title="Training loss", xlabel="step", ylabel="cross-entropy, whole training set", yscale="log")
    axes.margins(x=0)


def _signal_to_noise(axes: Axes, ratios: Mapping[str, Sequence[float]]) -> None:
    for index, (name, values) in enumerate(ratios.items()):
        colour, dashes = LAYER_STYLES[index]
        axes.plot(values, color=colour, linestyle=dashes, linewidth=2, label=f"layer {index + 1} ({name})")
    axes.set(title="Gradient signal-to-noise, KFAC's run", xlabel="step", ylabel="‖mean gₙ‖² / Σ var gₙ", yscale="log")
    axes.margins(x=0)
    axes.legend(frameon=False, handlelength=2.4)


def _curvature(axes: Axes, curvature: Mapping[str, Tensor]) -> None:
    """One histogram above the other. Entries that are exactly zero (blank pixels) have no place on a log axis."""
    positive = {name: values[values > 0].numpy() for name, values in curvature.items()}
    everything = np.concatenate(list(positive.values()))
    low, high = np.quantile(everything, 0.002), everything.max()
    edges, start = np.geomspace(low, high, 50), low / (high / low) ** 0.3  # names stand between start and low
    for row, (name, values) in enumerate(reversed(positive.items())):
        layer, base = len(positive) - row, 1.2 * row
        colour, _ = LAYER_STYLES[layer - 1]
        heights, _ = np.histogram(values, edges)
        axes.stairs(base + heights / heights.max(), edges, baseline=base, fill=True, color=colour, alpha=0.85)
        axes.axhline(base, color=colour, linewidth=1)
        axes.text(start * 1.05, base + 0.08, f"layer {layer}\n{name}", color=colour, weight="bold")
    axes.set(title="Curvature at initialisation", xlabel="Gauss–Newton diagonal", ylabel="weights (scaled to the peak)")
    axes.set(xscale="log", xlim=(start, high * 1.2), ylim=(0, 1.2 * len(positive)), yticks=[])
    axes.grid(axis="y", visible=False)
