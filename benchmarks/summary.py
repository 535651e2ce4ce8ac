"""From timings to the numbers of a cell."""

from __future__ import annotations

from statistics import median, quantiles
from typing import Any

Cell = dict[str, Any]
MB = 1e6


def timings(rounds: list[dict[str, dict[str, float]]]) -> Cell:
    """Medians and quartiles of the ratios, elapsed and CPU, and the median times in milliseconds."""
    found: Cell = {"repeats": len(rounds)}
    for clock in ("wall", "cpu"):
        ratios = [r["feature"][clock] / r["plain"][clock] for r in rounds]
        low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        found[clock] = {
            "ratio": middle,
            "low": low,
            "high": high,
            "plain_ms": 1000 * median(r["plain"][clock] for r in rounds),
            "feature_ms": 1000 * median(r["feature"][clock] for r in rounds),
        }
    return found


def peaks(answer: dict[str, Any]) -> Cell:
    """Megabytes of the gradient alone, and what the features take on top."""
    if "failed" in answer:
        return {"memory": answer}
    return {"memory": {"plain_mb": answer["plain"] / MB, "extra_mb": (answer["feature"] - answer["plain"]) / MB}}
