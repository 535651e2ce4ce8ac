"""Diagonals of the curvature at outputs of calls whose parameters read no more of it: Σ_v s² of columns is one, too.

Features that add what columns and diagonals leave on a parameter get both by one product, once all have arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

from torch import Tensor

from .calls import Call
from .demand import EXACT, Demand, Source
from .precision import widened
from .rules import Need
from .subsampling import quantities_of
from .sums import summed_squares
from .uses import Use

#: Takes a parameter, the source of a quantity and the quantity by need, and adds it to what is there.
Accumulate: TypeAlias = Callable[[Tensor, Source, dict[Need, Tensor]], None]


class Diagonals:
    """What arrives at calls; `shared`: parameters that have other uses."""

    def __init__(self, demand: Demand, shared: Collection[int]) -> None:
        self.demand, self.shared = demand, shared
        self._found: dict[Call, Tensor] = {}
        self._served: dict[Call, Mapping[Need, Need]] = {}

    def take_columns(self, call: Call, factor: Tensor, *signs: Tensor) -> bool:
        """Σ_v ± s² of columns [V, *output], whose signs [V, N] are all + where they are not given; False if the call needs the columns."""
        return bool(self._needs(call)) and self.take(call, _squares(factor, *signs))

    def take(self, call: Call, diagonal: Tensor) -> bool:
        """A diagonal [*output]; False if the call needs more."""
        if not self._needs(call):
            return False
        self._found[call] = self._found[call] + diagonal if call in self._found else diagonal
        return True

    def finish(self, accumulate: Accumulate) -> None:
        for call, diagonal in self._found.items():
            needs = self._needs(call)
            for name, parameter in call.parameters.items():
                found = quantities_of([Use(call.record, name, diagonal)], tuple(needs))
                accumulate(parameter, EXACT, {needs[need]: value for need, value in found.items()})

    def _needs(self, call: Call) -> Mapping[Need, Need]:
        """What is asked of a diagonal that serves for what is asked of exact columns; empty if it does not, for some parameter."""
        if call not in self._served:
            layer, names = call.record.definition, call.parameters
            needs = self.demand.of_diagonals(layer)
            serves = (
                bool(needs)
                and call.reads_diagonal
                and not any(id(parameter) in self.shared for parameter in names.values())
                and all(need.quantity in layer.parameters[name] for name in names for need in needs)
            )
            self._served[call] = needs if serves else {}
        return self._served[call]


@widened
def _squares(factor: Tensor, *signs: Tensor) -> Tensor:
    """Σ_v ± s² [*output] of columns [V, *output]."""
    if not signs:
        return summed_squares(factor, 1)
    (sign,) = signs
    return (factor.square() * sign.reshape(*sign.shape, *[1] * (factor.ndim - 2))).sum(0)
