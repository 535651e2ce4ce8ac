"""Tables of results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from summary import Cell

Results = dict[str, dict[str, Cell]]


def tables(network: str, results: Results) -> Iterator[Table]:
    """Cells down, implementations across: ratios of elapsed and CPU time with quartiles, then memory."""
    implementations = list(dict.fromkeys(name for cell in results.values() for name in cell))
    for clock, title in (("wall", "elapsed"), ("cpu", "CPU")):
        yield _table(f"{network}: {title} time with the features / without", implementations, results, clock)
    if any("memory" in found for cell in results.values() for found in cell.values()):
        yield _table(f"{network}: peak memory in MB above the gradient's", implementations, results, "memory")


def _table(title: str, implementations: list[str], results: Results, what: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("features")
    for implementation in implementations:
        table.add_column(implementation, justify="right")
    for cell, found in results.items():
        best = min((value(found[name], what) for name in found), default=None)
        texts = []
        for name in implementations:
            text = escape(shown(found.get(name, {}), what))
            texts.append(f"[bold]{text}[/]" if name in found and value(found[name], what) == best else text)
        table.add_row(cell, *texts)
    return table


def value(found: Cell, what: str) -> float:
    """The number to compare; infinite where there is none."""
    if "failed" in found or what not in found or "failed" in found[what]:
        return float("inf")
    return float(found[what]["extra_mb" if what == "memory" else "ratio"])


def shown(found: Cell, what: str) -> str:
    if not found:
        return "–"
    if "failed" in found:
        return brief(found["failed"])
    if what == "memory":
        memory = found.get("memory", {"failed": "–"})
        return brief(memory["failed"]) if "failed" in memory else f"{memory['extra_mb']:.0f}"
    ratio = found[what]
    return f"{ratio['ratio']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def brief(reason: str) -> str:
    return reason if len(reason) <= 24 else f"{reason[:23]}…"


def comparison(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Ratios of earlier and these results, where both have the cell."""
    table = Table(title="before → after", box=box.SIMPLE_HEAD)
    for column in ("network", "features", "implementation"):
        table.add_column(column)
    for column in ("elapsed", "CPU", "change", "MB"):
        table.add_column(column, justify="right")
    for network, results in after["networks"].items():
        for cell, found in results.items():
            for name, new in found.items():
                old = before["networks"].get(network, {}).get(cell, {}).get(name)
                if old is not None:
                    columns = [f"{_number(old, w)} → {_number(new, w)}" for w in ("wall", "cpu", "memory")]
                    change = f"{value(new, 'cpu') / value(old, 'cpu'):.2f}"
                    table.add_row(network, cell, name, columns[0], columns[1], change, columns[2])
    return table


def _number(found: Cell, what: str) -> str:
    number = value(found, what)
    return shown(found, what) if number == float("inf") else f"{number:.0f}" if what == "memory" else f"{number:.2f}"
