"""Names, groups and offsets of a Triton program: which axes are walked as one, and where an element lies in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..lowering.programs import Axes, Program, Read
from ..notation import Option

Group = tuple[str, ...]


def chains(tensors: Sequence[Axes], role: Mapping[str, str]) -> list[Group]:
    """Axes of one role that are adjacent, in one order, in every tensor that has any of them: walked as one axis."""
    order = list(dict.fromkeys(axis for axes in tensors for axis in axes))
    groups: list[Group] = []
    for axis in order:
        if groups and role[axis] == role[groups[-1][-1]] and _adjacent(groups[-1][-1], axis, tensors):
            groups[-1] = (*groups[-1], axis)
        else:
            groups.append((axis,))
    return groups


def _adjacent(first: str, second: str, tensors: Sequence[Axes]) -> bool:
    for axes in tensors:
        if (first in axes) != (second in axes):
            return False
        if first in axes and axes.index(second) != axes.index(first) + 1:
            return False
    return True


def grouped(axes: Axes, groups: Iterable[Group]) -> tuple[Group, ...]:
    """The groups that make up a tensor's axes, in its order."""
    return tuple(sorted((g for g in groups if g[0] in axes), key=lambda g: axes.index(g[0])))


@dataclass(frozen=True)
class Names:
    """The names that a program's code uses: sizes are capital axes, values and indices are named like tensors and axes."""

    program: Program
    reserved: frozenset[str] = frozenset()

    def extent(self, axis: str) -> str:
        axis = self.program.equal.get(axis, axis)
        return f"{axis.upper()}_extent" if axis.upper() in self.program.tensors else axis.upper()

    def size(self, group: Group) -> str:
        """The kernel's argument that holds the extent of a group."""
        return self.extent(group[0]) if len(group) == 1 else "".join(group).upper()

    def value(self, read: Read) -> str:
        taken = self.reserved | {self.extent(axis) for r in self.program.all_reads for axis in r.axes}
        return f"{read.symbol}_value" if read.symbol in taken else read.symbol

    def option(self, option: Option) -> str:
        """The kernel's argument that holds a number of the module."""
        name = option.attribute if option.part is None else f"{option.attribute}_{option.part}"
        return f"{name}_option" if name in self.reserved else name

    def index(self, group: Group) -> str:
        name = "".join(group)
        taken = self.reserved | {read.symbol for read in self.program.all_reads}
        return f"{name}_index" if name in taken else name

    def extents(self, axes: Iterable[str]) -> list[str]:
        return [self.extent(axis) for axis in axes]


def product(factors: Iterable[str]) -> str:
    return " * ".join(factors) or "1"


def scaled(index: str, factors: Sequence[str]) -> str:
    """index · stride, left to right, so that a 64-bit index keeps the product 64-bit."""
    return " * ".join([index, *factors])


def offset(layout: Sequence[Group], index: Mapping[Group, str], sizes: Mapping[Group, str]) -> str:
    """Σ index · stride over the groups of a tensor that have an index."""
    terms = [
        scaled(index[group], [sizes[after] for after in layout[position + 1 :]])
        for position, group in enumerate(layout)
        if group in index
    ]
    return " + ".join(terms)


def plus(*terms: str) -> str:
    return " + ".join(term for term in terms if term)


def used(names: Iterable[str], code: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that occur in `code`, in their order."""
    words = set(re.findall(r"\w+", "\n".join(code)))
    return tuple(name for name in dict.fromkeys(names) if name in words)


def decode(
    index: str,
    axes: Sequence[Group],
    sizes: Mapping[Group, str],
    names: Mapping[Group, str],
    widen: bool = True,
) -> dict[Group, str]:
    """Statements that take a flat index over several groups apart, by group: `n = row // R`, `r = row % R`.

    A 64-bit division is a function call on GPUs: 32-bit indices are divided first and widened afterwards.
    """
    statements = {}
    for position, group in enumerate(axes):
        after = [sizes[g] for g in axes[position + 1 :]]
        code = f"{index} // ({product(after)})" if len(after) > 1 else f"{index} // {after[0]}" if after else index
        if position:
            code += f" % {sizes[group]}"
        statements[group] = f"{names[group]} = tl.cast({code}, tl.int64)" if widen else f"{names[group]} = {code}"
    return statements
