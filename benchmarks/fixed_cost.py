"""What a layer and a feature cost besides arithmetic: many small layers, where operations of torch compute next to nothing.

    .venv-bench/bin/python benchmarks/fixed_cost.py

CPU time of a step per layer, beyond the plain step's, and the operations that torch is called for: an operation of the plain step,
which takes its share of autograd's time, is the unit by which machines and their phases compare.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import satchel.extensions
from cells import CELLS, NOTHING
from meter import seconds_per_step
from peers.satchel_api import Nothing
from satchel import backpack, extend

LAYERS, WIDTH, BATCH, STEPS, REPEATS = 20, 8, 4, 8, 9


class Counted(TorchDispatchMode):
    """The number of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def steps() -> dict[str, Callable[[], None]]:
    """A step of the plain network, and one with each set of features."""
    x, y = torch.randn(BATCH, WIDTH), torch.arange(BATCH)
    plain, extended = (nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))) for _ in range(2))
    extend(extended)

    def step(model: nn.Module, loss: nn.Module) -> None:
        loss(model(x), y).backward()
        model.zero_grad()

    def with_features(names: tuple[str, ...]) -> None:
        made = [Nothing() if name == NOTHING else getattr(satchel.extensions, name)() for name in names]
        with backpack(*made):
            step(extended, extended_loss)

    plain_loss, extended_loss = nn.CrossEntropyLoss(), extend(nn.CrossEntropyLoss())
    found: dict[str, Callable[[], None]] = {"plain": lambda: step(plain, plain_loss)}
    return found | {cell: lambda names=names: with_features(names) for cell, names in CELLS.items()}


def main() -> None:
    torch.set_num_threads(1)
    cells = steps()
    for run in cells.values():
        seconds_per_step(run, 3)
    taken: dict[str, list[float]] = {cell: [] for cell in cells}
    for _ in range(REPEATS):
        for cell, run in cells.items():
            taken[cell].append(seconds_per_step(run, STEPS).cpu / LAYERS * 1e6)
    base = median(taken["plain"])
    print(f"{'':20}{'µs a layer':>12}{'operations':>12}")
    for cell, run in cells.items():
        with Counted() as counted:
            run()
        beyond = base if cell == "plain" else median(taken[cell]) - base
        print(f"{cell:20}{beyond:12.0f}{counted.operations / LAYERS:12.1f}")


if __name__ == "__main__":
    main()
