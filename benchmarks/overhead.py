"""How much longer a training step takes with a feature: time(forward + backward + feature) / time(forward + backward).

One process for each implementation; they take turns, so that a slow minute of the machine slows all of them alike. Each
repeat times a plain step next to the extended one and gives one ratio; the median and the quartiles are shown.
Freeing the fields is part of the step.

python benchmarks/overhead.py [--impl satchel --impl backpack] [--python backpack=PATH] [--out overhead.json]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from worker import FEATURES, IMPLEMENTATIONS, NETWORKS

WORKER = Path(__file__).with_name("worker.py")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Worker:
    """A process that times one implementation on request."""

    def __init__(self, implementation: str, python: str, threads: int) -> None:
        settings = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        self.implementation = implementation
        self.process = subprocess.Popen(
            [python, str(WORKER), implementation, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | settings,
        )
        self.environment = self._answer()

    def measure(self, network: str, feature: str, steps: int) -> dict[str, float]:
        """Seconds per step, `plain` and with the `feature`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"network": network, "feature": feature, "steps": steps}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process that measures {self.implementation} ended; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def summary(times: list[dict[str, float]]) -> dict[str, float]:
    """Median and quartiles of the ratios, and the median times in milliseconds."""
    ratios = [t["feature"] / t["plain"] for t in times]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return {
        "ratio": middle,
        "low": low,
        "high": high,
        "plain_ms": 1000 * median(t["plain"] for t in times),
        "feature_ms": 1000 * median(t["feature"] for t in times),
    }


def results_table(network: str, results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Features down, implementations across; the quartiles in small print."""
    table = Table(title=f"{network}: time with the feature / time without", box=box.SIMPLE_HEAD)
    table.add_column("feature")
    for implementation in results:
        table.add_column(implementation, justify="right")
        table.add_column("quartiles", justify="right", style="dim")
    for feature in next(iter(results.values())):
        rows = [by_feature[feature] for by_feature in results.values()]
        best = min(row["ratio"] for row in rows)
        cells = []
        for row in rows:
            ratio = f"{row['ratio']:.2f}"
            cells += [f"[bold]{ratio}[/]" if row["ratio"] == best else ratio, f"{row['low']:.2f}–{row['high']:.2f}"]
        table.add_row(feature, *cells)
    return table


@app.command()
def main(
    impl: Annotated[list[str] | None, typer.Option(help="What to measure; may be repeated. Default: all.")] = None,
    network: Annotated[list[str] | None, typer.Option(help="On what; may be repeated. Default: all.")] = None,
    python: Annotated[list[str] | None, typer.Option(help="IMPL=PATH, its interpreter; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Ratios per feature.")] = 15,
    steps: Annotated[int, typer.Option(min=1, help="Steps in one timing.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process; they take turns.")] = 2,
    out: Annotated[Path, typer.Option(help="Where to write the results.")] = Path("overhead.json"),
) -> None:
    """Measure the overhead of every feature."""
    console = Console()
    names, networks = impl or list(IMPLEMENTATIONS), network or list(NETWORKS)
    for given, known, option in ((names, IMPLEMENTATIONS, "--impl"), (networks, NETWORKS, "--network")):
        if unknown := set(given) - set(known):
            raise typer.BadParameter(f"{', '.join(sorted(unknown))}; known are {', '.join(known)}", param_hint=option)
    interpreters = dict.fromkeys(names, sys.executable) | dict(pair.split("=", 1) for pair in python or ())

    report: dict[str, Any] = {"repeats": repeats, "steps": steps, "threads": threads, "networks": {}}
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(name, interpreters[name], threads)) for name in names]
        report["environment"] = {worker.implementation: worker.environment for worker in workers}
        for net in networks:
            times: dict[str, dict[str, list[dict[str, float]]]] = {name: {f: [] for f in FEATURES} for name in names}
            for _ in track(range(repeats), description=f"measuring {net}", console=console):
                for feature in FEATURES:
                    for worker in workers:
                        times[worker.implementation][feature].append(worker.measure(net, feature, steps))
            results = {name: {f: summary(t) for f, t in by_feature.items()} for name, by_feature in times.items()}
            report["networks"][net] = results
            console.print(results_table(net, results))
    for name, environment in report["environment"].items():
        console.print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in environment.items()), highlight=False)
    out.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"Wrote {out}")


if __name__ == "__main__":
    app()
