"""The choice between programs that compute the same value, by their cost on the shapes at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, update_wrapper
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lazy import lazy
from .memory import Out
from .modes import with_few_threads
from .precision import widened

#: Elements that a block has at least, also where the cache of a core is not known, and at most.
_BLOCK = 1 << 19, 1 << 20
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


def cached_elements() -> int:
    """Elements of float32 that the second cache of a core holds, as Linux tells: "2048K"."""
    try:
        kibibytes = int(_CACHE.read_text().strip().removesuffix("K"))
    except (OSError, ValueError):  # another system, or one that does not tell
        kibibytes = 0
    least, most = _BLOCK
    return min(max(least, (kibibytes << 10) // torch.float32.itemsize), most)


@dataclass(frozen=True, eq=False)
class Machine:
    """What a second buys on so many cores; only ratios matter for the choice."""

    cores: int = 2
    flops_per_second: float = 5e10
    elements_per_second: float = 2e9
    cached_per_second: float = 8e9
    seconds_per_call: float = 5e-6
    cache_elements: int = field(default_factory=cached_elements)


@dataclass(frozen=True)
class Program:
    """One way to compute a rule: its floating-point operations, the elements of operands and result, and operations called.

    `scratch` elements are moved through intermediates: through cache where the largest of these, of `peak` elements, does not
    exceed the nearest one by much. Where that is not said they are taken to be as large as the operands and the result.
    `writes`: whether the function takes `out`, in which it computes its value where that saves memory. A function's own `overhead`
    is what Python takes around its operations, in calls of these.
    """

    function: Callable[..., Tensor]
    flops: int
    elements: int
    scratch: int = 0
    peak: int = 0
    calls: int = 1
    valid: bool = True
    writes: bool = False

    @property
    def name(self) -> str:
        """What it can be forced by: "separated", "gram" …"""
        return getattr(self.function, "__name__", type(self.function).__name__).lower().rpartition("_")[2]

    def run(self, *operands: Any, out: Out = None) -> Tensor:
        """The value, of operands of any precision."""
        given = {"out": out} if self.writes else {}
        return with_few_threads(self._widened, self._seconds_alone, self.calls, operands, given)

    @lazy
    def _widened(self) -> Callable[..., Tensor]:
        return widened(self.function)

    @lazy
    def _seconds_alone(self) -> float:
        """What one thread takes, beyond calls."""
        return machine.cores * self._work

    @lazy
    def seconds(self) -> float:
        """The predicted time."""
        around: int = getattr(self.function, "overhead", 0)
        return self._work + (self.calls + around) * machine.seconds_per_call

    @property
    def _work(self) -> float:
        """The time beyond calls."""
        cached = (self.peak or self.elements) <= _TOGETHER * machine.cache_elements
        return (
            self.flops / machine.flops_per_second
            + self.elements / machine.elements_per_second
            + self.scratch / (machine.cached_per_second if cached else machine.elements_per_second)
        )

    @property
    def seconds_beside_gradient(self) -> float:
        """Where the same products save those of the gradient, which are faster for being of all samples at once."""
        return self.seconds - _SAVED * self.flops / machine.flops_per_second

    @property
    def seconds_among_others(self) -> float:
        """Where the products themselves are there already, and the loop over blocks, too."""
        return replace(self, flops=0, elements=0)._work + self.calls * machine.seconds_per_call


machine = Machine()
#: Time of the gradient's products in that of the samples'.
_SAVED = 0.65
#: Columns of a sample that are taken together where a cache does not hold them, but as many do.
_TOGETHER = 4
#: Caches that products which are kept may fill in one block.
_JOINED = 2
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


class cheapest:
    """A rule with several programs: the decorated function gives those for its operands, a call runs the one of least predicted time."""

    def __init__(self, programs: Callable[..., tuple[Program, ...]]) -> None:
        self.programs = programs
        self._ranked = lru_cache(maxsize=1 << 10)(self._rank)
        update_wrapper(self, programs)

    def ranked(self, *operands: Any) -> tuple[Program, ...]:
        """The programs that there are for these operands, or the one that is forced; that of least predicted time first."""
        ranked = self._ranked(
            machine, *[operand.shape if isinstance(operand, Tensor) else operand for operand in operands]
        )
        for choices in _recordings:
            choices.append(ranked)
        name = forced_program()
        return ranked if name is None else tuple(program for program in ranked if program.name == name) or ranked

    def _rank(self, _: Machine, *operands: Any) -> tuple[Program, ...]:
        shapes = [_Shaped(operand) if isinstance(operand, torch.Size) else operand for operand in operands]
        return tuple(
            sorted((program for program in self.programs(*shapes) if program.valid), key=attrgetter("seconds"))
        )

    def __call__(self, *operands: Any) -> Tensor:
        best, *_ = self.ranked(*operands)
        return best.run(*operands)


class _Shaped(NamedTuple):
    """What costs depend on."""

    shape: tuple[int, ...]


def block_count(columns: int, samples: int, each: int) -> int:
    """The number of blocks that `blocks` yields."""
    wide, long = block_shape(columns, samples, each)
    return -(-max(columns, 1) // wide) * -(-max(samples, 1) // long)


def blocks(columns: int, samples: int, each: int, kept: bool = False) -> Iterator[tuple[slice, slice]]:
    """Slices of columns and samples whose products, of `each` elements per column and sample, stay in cache; at least one."""
    wide, long = block_shape(columns, samples, each, kept)
    for column in range(0, max(columns, 1), wide):
        for sample in range(0, max(samples, 1), long):
            yield slice(column, column + wide), slice(sample, sample + long)


def block_shape(columns: int, samples: int, each: int, kept: bool = False) -> tuple[int, int]:
    """The most columns and samples that a block of `blocks` has; all, where products that are kept exceed the cache by little, for
    joining blocks is a copy to fresh pages.

    Columns first: they share what is made of a sample, which pays for a few that leave the nearest cache. Blocks of samples are
    of one length: a short one at the end costs as many calls.
    """
    if kept and columns * samples * each <= _JOINED * machine.cache_elements:
        return max(columns, 1), max(samples, 1)
    room = machine.cache_elements // max(1, each)
    few = min(_TOGETHER, _TOGETHER * machine.cache_elements // max(1, each))
    wide = min(columns, max(1, few, room)) or 1
    count = -(-samples // max(1, room // wide))
    return wide, max(1, -(-samples // max(1, count)))
