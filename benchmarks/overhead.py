"""How much longer a training step takes with a feature: time(forward + backward + feature) / time(forward + backward).

Each implementation has a process of its own; they take turns, timing by timing, so that a slow minute of the machine slows all of
them alike. Each repeat times a plain step next to the extended one and gives one ratio. See README.md for all that is measured.

python benchmarks/overhead.py [--networks mlp,3c3d] [--features KFAC,"all ten"] [--impl satchel,backpack] [--quick]
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

import plot
import report
from bound import bound
from cells import CELLS
from check import agreement
from client import Worker
from environment import environment
from overview import overview
from peers import PEERS
from problems import NETWORKS
from summary import Cell, peaks, timings

QUICK = {"networks": "mlp", "features": "BatchGrad,Variance,DiagGGNExact,KFAC", "impl": "satchel,backpack"}
#: Repeats of a cell, however long they take: below, there are no quartiles.
LEAST = 3

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Run:
    """One network on all workers: who takes part in a cell, and what came out."""

    def __init__(self, workers: list[Worker], network: str, cells: list[str], patience: float, budget: float) -> None:
        self.workers, self.network, self.cells = workers, network, cells
        self.patience, self.budget = patience, budget
        self.results: report.Results = {cell: {worker.implementation: {} for worker in workers} for cell in cells}
        self._steps: dict[tuple[str, str], dict[str, int]] = {}
        self._spent: dict[tuple[str, str], float] = {}
        self._rounds: dict[tuple[str, str], list[Any]] = {}

    def check(self) -> None:
        """Whoever computes something else than satchel has failed."""
        reference = next((worker for worker in self.workers if worker.implementation == "satchel"), None)
        errors: dict[tuple[str, str], Cell] = {}
        for cell, worker in self._pairs():
            if reference is None or worker is reference:
                continue
            for feature in CELLS[cell]:
                key = feature, worker.implementation
                if key not in errors:
                    errors[key] = agreement(reference, worker, self.network, feature, self.patience)
                self.results[cell][worker.implementation].setdefault("checks", {})[feature] = errors[key]
                if "failed" in errors[key]:
                    self._note(cell, worker, {"failed": errors[key]["failed"]})
                    break

    def prepare(self) -> None:
        """First steps. A set is not tried by whom one of its members is too dear."""
        for cell, worker in self._pairs():
            members = {name: self.results.get(name, {}).get(worker.implementation, {}) for name in CELLS[cell]}
            answer = next(
                ({"failed": f"{name}: {found['failed']}"} for name, found in members.items() if "failed" in found), None
            ) or worker.ask(self.patience, do="prepare", network=self.network, cell=cell)
            if "failed" in answer:
                self._note(cell, worker, answer)
            else:
                self._steps[cell, worker.implementation] = {step: int(count) for step, count in answer.items()}

    def remember_peaks(self) -> None:
        for cell, worker in self._pairs():
            answer = worker.ask(10 * self.patience, do="memory", network=self.network, cell=cell)
            self._note(cell, worker, peaks(answer))

    def round(self, index: int) -> None:
        """One ratio of each cell that has time left; every cell has `LEAST`."""
        for cell, worker in self._pairs():
            key = cell, worker.implementation
            if index >= LEAST and self._spent[key] > self.budget:
                continue
            start = time.perf_counter()
            request = {"do": "time", "network": self.network, "cell": cell, "steps": self._steps[key]}
            answer = worker.ask(10 * self.patience, **request)
            self._spent[key] = self._spent.get(key, 0) + time.perf_counter() - start
            if "failed" in answer:
                self._note(cell, worker, answer)
            else:
                self._rounds.setdefault(key, []).append(answer)

    def find_bounds(self, rates: dict[str, Any]) -> None:
        for cell, worker in self._pairs():
            if worker.implementation == "satchel":
                counts = worker.ask(10 * self.patience, do="count", network=self.network, cell=cell)
                self._note(cell, worker, {"bound": counts if "failed" in counts else bound(counts, rates, cell)})

    def summarise(self) -> report.Results:
        for cell, worker in self._pairs():
            self._note(cell, worker, timings(self._rounds[cell, worker.implementation]))
        return self.results

    def _pairs(self) -> list[tuple[str, Worker]]:
        """Those that have not failed."""
        return [
            (cell, worker)
            for cell in self.cells
            for worker in self.workers
            if "failed" not in self.results[cell][worker.implementation]
        ]

    def _note(self, cell: str, worker: Worker, found: Cell) -> None:
        self.results[cell][worker.implementation].update(found)


def chosen(given: str | None, known: dict[str, Any], option: str) -> list[str]:
    """Comma-separated names; all where none is given."""
    names = [name.strip() for name in given.split(",")] if given else list(known)
    if unknown := set(names) - set(known):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; known are {', '.join(known)}", param_hint=option)
    return names


@app.command()
def main(
    networks: Annotated[str | None, typer.Option(help="On what, separated by commas. Default: all.")] = None,
    features: Annotated[str | None, typer.Option(help="Features and sets of them. Default: all.")] = None,
    impl: Annotated[str | None, typer.Option(help="Implementations. Default: all.")] = None,
    python: Annotated[list[str] | None, typer.Option(help="IMPL=PATH, its interpreter; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Ratios per cell.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process; they take turns.")] = 2,
    patience: Annotated[float, typer.Option(help="Seconds for the first step of a cell.")] = 60,
    budget: Annotated[float, typer.Option(help="Seconds after which a cell is not repeated, once it has three.")] = 20,
    memory: Annotated[float, typer.Option(help="GB that a process may take.")] = 13,
    checks: Annotated[bool, typer.Option(help="Compare results with satchel's first.")] = True,
    peak: Annotated[bool, typer.Option(help="Measure peak memory.")] = True,
    bounds: Annotated[bool, typer.Option(help="Count what satchel's programs cost at the least.")] = True,
    quick: Annotated[bool, typer.Option(help="For development: one network, few features and repeats.")] = False,
    compare: Annotated[Path | None, typer.Option(help="An earlier result, to be shown beside this one.")] = None,
    onto: Annotated[Path | None, typer.Option(help="An earlier result, whose other networks this one keeps.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write the results.")] = Path("overhead.json"),
) -> None:
    """Measure the overhead of the features."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    if quick:
        networks, features, impl = networks or QUICK["networks"], features or QUICK["features"], impl or QUICK["impl"]
        repeats, checks, bounds = min(repeats, 5), False, False
    cells, names = chosen(features, CELLS, "--features"), chosen(impl, PEERS, "--impl")
    interpreters = dict.fromkeys(names, sys.executable) | dict(pair.split("=", 1) for pair in python or ())
    workers = [Worker(name, interpreters[name], threads, int(memory * 1e9)) for name in names]
    kept = json.loads(onto.read_text())["networks"] if onto else {}
    results: dict[str, Any] = {"environment": environment(threads), "implementations": {}, "networks": kept}
    for worker in workers:
        results["implementations"][worker.implementation] = worker.about
        if "failed" in worker.about:
            console.print(f"[red]{worker.implementation} takes no part: {worker.about['failed']}[/]", highlight=False)
    workers = [worker for worker in workers if "failed" not in worker.about]

    measurer = next((worker for worker in workers if worker.implementation == "satchel"), None)
    rates = measurer.ask(120, do="machine", network="", cell="") if measurer and bounds else {}
    results["machine"] = rates

    for name in chosen(networks, NETWORKS, "--networks"):
        own = [cell for cell in cells if not NETWORKS[name].cells or cell in NETWORKS[name].cells]
        run = Run(workers, name, own, patience, budget)
        with Progress(console=console, transient=True) as progress:
            stages = [run.check] * checks + [run.prepare] + [run.remember_peaks] * peak
            stages += [partial(run.find_bounds, rates)] * bool(rates)
            task = progress.add_task(name, total=repeats + len(stages))
            for stage in stages:
                stage()
                progress.advance(task)
            for index in range(repeats):
                run.round(index)
                progress.advance(task)
        results["networks"][name] = run.summarise()
        out.write_text(json.dumps(results, indent=2) + "\n")  # after each network: a long run may be interrupted
        for grid in report.grids(name, run.results):
            console.print(report.rich_table(grid))
    for worker in workers:
        worker.close()
    if compare:
        console.print(report.comparison(json.loads(compare.read_text()), results))
    out.with_suffix(".md").write_text(f"{report.markdown(results)}\n{overview(results)}\n")
    plot.draw(results, out.with_suffix(".png"))
    console.print(f"Wrote {out}, and .md and .png beside it")


if __name__ == "__main__":
    app()
