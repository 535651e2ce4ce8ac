"""Which parameters the running backward computes a gradient of."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.autograd.graph import Node

from .record import Record
from .torch_private import accumulator, will_run


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

    def of(self, record: Record) -> Mapping[str, Tensor]:
        """Those that a layer uses, by name."""
        if record not in self._of:
            self._of[record] = {name: p for name, p in record.trainable().items() if p in self}
        return self._of[record]

    def clear(self) -> None:
        self._accumulators.clear()
        self._of.clear()
