"""Which parameters the running backward computes a gradient of."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.autograd.graph import Node

from .record import Record
from .torch_private import accumulator, accumulators_below, will_run


class Wanted:
    """Asked once in a pass for each parameter."""

    def __init__(self) -> None:
        self._accumulators: dict[int, Node | None] = {}
        self._of: dict[Record, Mapping[str, Tensor]] = {}

    def __contains__(self, parameter: Tensor) -> bool:
        return self.accumulator(parameter) is not None

    def accumulator(self, parameter: Tensor) -> Node | None:
        """The node that adds to the parameter's gradient; None if the backward does not run it."""
        key = id(parameter)
        if key not in self._accumulators:
            node = accumulator(parameter) if parameter.requires_grad else None
            self._accumulators[key] = node if node is not None and will_run(node) else None
        return self._accumulators[key]

    def of(self, record: Record, node: Node | None = None) -> Mapping[str, Tensor]:
        """Those that a layer uses, by name. node: the layer's, where it is at hand: its neighbours need not be searched then."""
        found = self._of.get(record)
        if found is None:
            for leaf, below in () if node is None else accumulators_below(node):
                self._accumulators.setdefault(id(leaf), below if will_run(below) else None)
            found = self._of[record] = {name: p for name, p in record.trainable().items() if p in self}
        return found

    def clear(self) -> None:
        self._accumulators.clear()
        self._of.clear()
