"""Where a layer's call has its axes: which of its input's and output's are the batch, and what is flattened to one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .axes import Axes, Batch, Layout
from .lazy import lazy
from .rules import Layer


@dataclass(eq=False)
class Geometry:
    """Depends on no values, so that calls of one structure share it from pass to pass."""

    layer: Layer
    options: Mapping[str, Any]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    batch: Batch

    def at(self, batch: Batch) -> Geometry:
        """The same call with the batch elsewhere."""
        return self if self.batch == batch else replace(self, batch=batch)

    def layout(self, axes: Axes, shape: tuple[int, ...]) -> Layout:
        layer, options = self.layer, self.options
        if not (layer.extents or layer.ranks):
            return Layout.of(axes)
        known = tuple((axis, options[size] if isinstance(size, str) else size) for axis, size in layer.extents.items())
        return Layout.of(axes, known, tuple((axis, rank(options, len(shape))) for axis, rank in layer.ranks.items()))

    @lazy
    def input_layout(self) -> Layout:
        return self.layout(self.layer.input_axes, self.input_shape)

    @lazy
    def output_layout(self) -> Layout:
        return self.layout(self.layer.output_axes, self.output_shape)

    @lazy
    def canonical_input(self) -> tuple[int, ...] | None:
        """Canonical shape of the input; None if it cannot have the batch there."""
        return self.batch.canonical_shape(self.input_layout, self.input_shape)

    @lazy
    def canonical_output(self) -> tuple[int, ...] | None:
        """Canonical shape of the output; None if it cannot have the batch there."""
        return self.batch.canonical_shape(self.output_layout, self.output_shape)

    @lazy
    def is_first(self) -> bool:
        """Whether the batch is the first axis of the output, by itself."""
        return self.batch.is_first(self.output_shape)

    @lazy
    def is_first_of_input(self) -> bool:
        """Whether it is that of the input."""
        return self.batch.is_first(self.input_shape)

    @lazy
    def misplaced(self) -> tuple[int, ...] | None:
        """Shape of the input, or else of the output, if it cannot have the batch there."""
        sides = ((self.input_layout, self.input_shape), (self.output_layout, self.output_shape))
        return next((shape for layout, shape in sides if self.batch.placed(layout, shape) is None), None)
