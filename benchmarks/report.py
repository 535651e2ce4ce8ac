"""Tables of results, on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from summary import Cell

Results = dict[str, dict[str, Cell]]
TITLES = {
    "wall": "elapsed time with the features / without (quartiles)",
    "cpu": "CPU time with the features / without (quartiles)",
    "memory": "peak memory in MB above the gradient's",
}


@dataclass(frozen=True)
class Grid:
    """Cells down, implementations across. `best`: the column of each row's least number, if there is one."""

    title: str
    head: list[str]
    rows: list[list[str]]
    best: list[int | None]


def grids(network: str, results: Results) -> Iterator[Grid]:
    for what, title in TITLES.items():
        if what != "memory" or any(what in found for cell in results.values() for found in cell.values()):
            yield grid(f"{network}: {title}", results, what)


def grid(title: str, results: Results, what: str) -> Grid:
    implementations = list(next(iter(results.values())))
    bounded = what != "memory" and any("bound" in found for cell in results.values() for found in cell.values())
    rows, best = [], []
    for cell, found in results.items():
        numbers = [value(found[name], what) for name in implementations]
        least = min(numbers)
        best.append(None if least == float("inf") else 1 + numbers.index(least))
        bounds = [bound_ratio(found, what)] if bounded else []
        rows.append([cell, *(shown(found[name], what) for name in implementations), *bounds])
    return Grid(title, ["features", *implementations, *(["bound"] if bounded else [])], rows, best)


def rich_table(grid: Grid) -> Table:
    table = Table(title=grid.title, box=box.SIMPLE_HEAD)
    for index, name in enumerate(grid.head):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row, best in zip(grid.rows, grid.best, strict=True):
        table.add_row(*(f"[bold]{escape(text)}[/]" if k == best else escape(text) for k, text in enumerate(row)))
    return table


def markdown(results: dict[str, Any]) -> str:
    """All tables, with the environment."""
    about = results["environment"]
    versions = ", ".join(f"{name} {found.get('version', '–')}" for name, found in results["implementations"].items())
    lines = [f"{about['cpu']}, {about['threads']} threads, commit {about['commit'][:12]}; {versions}.", ""]
    for network, found in results["networks"].items():
        for table in grids(network, found):
            lines += [f"**{table.title}**", "", *table_head(table.head)]
            for row, best in zip(table.rows, table.best, strict=True):
                lines.append(table_line([f"**{text}**" if k == best else text for k, text in enumerate(row)]))
            lines.append("")
    return "\n".join(lines)


def table_head(texts: list[str]) -> list[str]:
    """A head and the line below it."""
    return [table_line(texts), table_line(["---"] * len(texts))]


def table_line(texts: list[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(text.replace('|', '/') for text in texts)} |"


def value(found: Cell, what: str) -> float:
    """The number to compare; infinite where there is none."""
    if "failed" in found or what not in found or "failed" in found[what]:
        return float("inf")
    return float(found[what]["extra_mb" if what == "memory" else "ratio"])


def peers(found: dict[str, Cell], what: str) -> dict[str, float]:
    """The numbers of a cell that satchel is compared with."""
    return {name: value(cell, what) for name, cell in found.items() if name != "satchel"}


def bound_ratio(found: dict[str, Cell], clock: str) -> str:
    ratio = lower_bound(found, clock)
    return "–" if ratio is None else f"{ratio:.2f}"


def lower_bound(found: dict[str, Cell], clock: str) -> float | None:
    """1 + the least time of satchel's programs / that of the gradient, as measured beside satchel."""
    cell = found.get("satchel", {})
    if "failed" in cell or clock not in cell.get("bound", {}) or clock not in cell:
        return None
    return 1 + 1000 * float(cell["bound"][clock]) / float(cell[clock]["plain_ms"])


def shown(found: Cell, what: str) -> str:
    if "failed" in found:
        return _brief(found["failed"])
    if what not in found:
        return "–"
    if "failed" in found[what]:
        return _brief(found[what]["failed"])
    if what == "memory":
        return f"{found[what]['extra_mb']:.0f}"
    ratio = found[what]
    return f"{ratio['ratio']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _brief(reason: str) -> str:
    """A table has no room for it; the JSON has it all."""
    return reason if len(reason) <= 18 else f"{reason[:17]}…"


def comparison(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Earlier and these results, where both have the cell; the change is that of the CPU ratio."""
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
                    wall, cpu, memory = (f"{_number(old, w)} → {_number(new, w)}" for w in TITLES)
                    known = "inf" not in (str(value(old, "cpu")), str(value(new, "cpu")))
                    change = f"{value(new, 'cpu') / value(old, 'cpu'):.2f}" if known else "–"
                    table.add_row(network, cell, name, wall, cpu, change, memory)
    return table


def _number(found: Cell, what: str) -> str:
    number = value(found, what)
    return shown(found, what) if number == float("inf") else f"{number:.0f}" if what == "memory" else f"{number:.2f}"
