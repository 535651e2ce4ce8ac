"""The choice between programs that compute the same value, by their cost on the shapes at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Machine:
    """What a second buys. The defaults are two cores' worth; only ratios matter for the choice."""

    flops_per_second: float = 5e10
    elements_per_second: float = 2e9
    seconds_per_call: float = 5e-6
    cache_elements: int = 1 << 18


@dataclass(frozen=True)
class Program:
    """One way to compute a rule: its floating-point operations, the elements of operands and result, and operations called.

    `scratch` elements are moved through intermediates, the largest of which has `peak`: through cache where that fits.
    """

    function: Callable[..., Tensor]
    flops: int
    elements: int
    scratch: int = 0
    peak: int = 0
    calls: int = 1
    valid: bool = True

    def seconds(self, machine: Machine) -> float:
        moved = self.elements + (self.scratch if self.peak > machine.cache_elements else 0)
        return (
            self.flops / machine.flops_per_second
            + moved / machine.elements_per_second
            + self.calls * machine.seconds_per_call
        )


machine = Machine()
_forced: list[str] = []
_recordings: list[list[tuple[Program, ...]]] = []


@contextmanager
def forced(program: str) -> Iterator[None]:
    """Within the context, rules that have a program of this name use it where it is valid ("gram", "blockwise", …)."""
    _forced.append(program)
    try:
        yield
    finally:
        _forced.pop()


def forced_program() -> str | None:
    """The name of the program that is forced, if one is."""
    return _forced[-1] if _forced else None


@contextmanager
def recorded() -> Iterator[list[tuple[Program, ...]]]:
    """Within the context, what each rule had to choose from, in order: its valid programs."""
    choices: list[tuple[Program, ...]] = []
    _recordings.append(choices)
    try:
        yield choices
    finally:
        _recordings.pop()


def cheapest(*programs: Program) -> Callable[..., Tensor]:
    """The valid program of least predicted time."""
    valid = [program for program in programs if program.valid]
    for choices in _recordings:
        choices.append(tuple(valid))
    name = forced_program()
    if name is not None:
        valid = [p for p in valid if p.function.__name__.endswith(f"_{name}")] or valid
    return min(valid, key=lambda program: program.seconds(machine)).function


def block_count(columns: int, samples: int, each: int) -> int:
    """The number of blocks that `blocks` yields."""
    wide, long = _block_shape(columns, samples, each)
    return -(-columns // wide) * -(-samples // long)


def blocks(columns: int, samples: int, each: int) -> Iterator[tuple[slice, slice]]:
    """Slices of columns and samples whose products, of `each` elements per column and sample, stay in cache."""
    wide, long = _block_shape(columns, samples, each)
    for column in range(0, columns, wide):
        for sample in range(0, samples, long):
            yield slice(column, column + wide), slice(sample, sample + long)


def _block_shape(columns: int, samples: int, each: int) -> tuple[int, int]:
    room = max(1, machine.cache_elements // max(1, each))
    long = min(samples, room) or 1
    return min(columns, max(1, room // long)) or 1, long
