"""What torch's operations alone take of a cell: those of a step, recorded and called once more, with no engine around them.

    .venv-bench/bin/python benchmarks/replayed.py 3c3d DiagGGNExact,KFAC

CPU time on two threads, as ratios to the gradient's: the step as it is, all of its operations, its products and convolutions. Each
of the last two stands for those of the gradient, too, in place of which it is put. Operands are there, and results are dropped at
once and leave their memory warm: where products alone exceed a target, the same products cannot meet it on this machine. All of the
operations may take more than the step: the recording holds their operands, so that nothing is written in the place of one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable
from statistics import median
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cells import CELLS, NOTHING
from meter import seconds_per_step
from targets import TARGETS
from worker import Steps

THREADS, REPEATS = 2, 5
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward", "_linear_pointwise")


class Recorded(TorchDispatchMode):
    """Operations with their operands, and the number of threads that each was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, str, Callable[[], Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        self.calls.append((torch.get_num_threads(), func.overloadpacket.__name__, lambda: func(*args, **given)))
        return func(*args, **given)

    @classmethod
    def of(cls, step: Callable[[], None]) -> Recorded:
        with cls() as recorded:
            step()
        return recorded

    def replay(self, names: Collection[str]) -> Callable[[], None]:
        """A step of these operations, or of all."""
        chosen = [(threads, call) for threads, name, call in self.calls if name in names or not names]

        def step() -> None:
            with torch.no_grad():
                for threads, call in chosen:
                    if threads != torch.get_num_threads():
                        torch.set_num_threads(threads)
                    call()
            torch.set_num_threads(THREADS)

        return step


def ratios(network: str, cell: str) -> dict[str, float]:
    """The step, and its floors."""
    steps = Steps("satchel", network, cell)
    for _ in range(3):
        steps.plain()
        steps.extended()
    plain, extended = Recorded.of(steps.plain), Recorded.of(steps.extended)
    runs = {"plain": steps.plain, "step": steps.extended}
    for kind, names in (("operations", ()), ("products", PRODUCTS)):
        runs |= {f"{kind} of plain": plain.replay(names), kind: extended.replay(names)}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            taken[name].append(seconds_per_step(run, 3).cpu)
    seconds = {name: median(found) for name, found in taken.items()}
    gradient = seconds["plain"]
    found = {"step": seconds["step"] / gradient}
    for kind in ("operations", "products"):
        found[kind] = 1 + (seconds[kind] - seconds[f"{kind} of plain"]) / gradient
    return found


def main(network: str, cells: Iterable[str]) -> None:
    torch.set_num_threads(THREADS)
    print(f"{network:20}{'step':>10}{'operations':>12}{'products':>10}{'target':>8}")
    for cell in cells:
        found = ratios(network, cell)
        target = TARGETS.get(network, {}).get(cell)
        print(f"{cell:20}{found['step']:10.2f}{found['operations']:12.2f}{found['products']:10.2f}{target or '–':>8}")


if __name__ == "__main__":
    asked = sys.argv[2].split(",") if len(sys.argv) > 2 else [cell for cell in CELLS if cell != NOTHING]
    main(sys.argv[1], asked)
