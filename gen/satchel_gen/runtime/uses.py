"""A use of a parameter: what it offers, and which uses are alike or differ in nothing but their positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .axes import Axes, starred
from .axes import names as axis_names
from .evaluate import evaluate
from .lazy import lazy
from .record import Record
from .rules import Layer, Rule
from .torch_private import version

PER_SAMPLE = "per_sample"


class Arrived(NamedTuple):
    """A gradient that belongs to autograd, and its version then: a hook may have changed it since."""

    gradient: Tensor
    version: int

    @property
    def unchanged(self) -> bool:
        return version(self.gradient) == self.version


class Use:
    """A parameter of a layer's call, and the canonical tensor at its output: columns [V, *output], or one [*output], or none.

    memo: what the parameters of one call have in common: values of rules that read the factor alone.
    total: Σ_n of its pullbacks of the one column, where autograd has computed them.
    """

    def __init__(
        self,
        record: Record,
        name: str,
        factor: Tensor | None = None,
        memo: dict[Callable[..., Tensor], Tensor] | None = None,
    ) -> None:
        self.record, self.name, self.factor = record, name, factor
        self.layer: Layer = record.definition
        self.key = self.layer, name
        self.rules: Mapping[str, Rule] = self.layer.parameters[name]
        self.memo: dict[Callable[..., Tensor], Tensor] = {} if memo is None else memo
        self.total: Arrived | None = None
        self._operands: dict[str, Any] = {}

    def operand(self, name: str) -> Any:
        """An operand of the rules, canonical; asked for once."""
        if name not in self._operands:
            self._operands[name] = self._operand(name)
        return self._operands[name]

    def _operand(self, name: str) -> Any:
        return self.record.operand(name)

    def forget(self) -> None:
        """Ask for operands again, which refuses those that have been overwritten since."""
        self._operands = {}

    def receive(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Note the transpose of `total`, which autograd is about to take back."""
        (gradient,) = gradients
        self.total = None if gradient is None else Arrived(gradient.mT, version(gradient))

    def release(self) -> None:
        """Drop all tensors: a hook on a node above the parameter's holds this until the pass ends."""
        self.factor, self.total, self.memo, self._operands = None, None, {}, {}

    def offers(self, quantity: str) -> bool:
        return quantity in self.rules

    @property
    def tensors(self) -> list[Tensor]:
        """What it is computed from."""
        kept = list(self.record.tensors.values())
        return kept if self.factor is None else [self.factor, *kept]

    def value(self, name: str, *arguments: Tensor, differentiable: bool = False) -> Tensor:
        """A quantity of the use, from what its rule takes."""
        rule = self.rules[name]
        found = evaluate(rule, self.layer, self.operand, *arguments, differentiable=differentiable)
        return shaped(rule, self, found)

    @lazy
    def parameter(self) -> Tensor:
        return self.record.parameter(self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's, as the definition has it; its own, where no definition covers the use."""
        if self.name in self.layer.parameter_axes:
            return self.record.parameter_shape(self.name)
        return tuple(self.parameter.shape)

    @property
    def positions(self) -> int:
        """How many elements of a sample's output share an element of the parameter: the extent of the axes that it lacks."""
        own = axis_names(self.layer.parameter_axes[self.name])
        _, *sizes = zip(axis_names(self.layer.output_axes), self.record.canonical_output, strict=True)
        return prod(size for axis, size in sizes if axis not in own)

    def block_bytes(self) -> int:
        """Size of the parameter's exact block."""
        return self.parameter.numel() ** 2 * self.parameter.element_size()


def shaped(rule: Rule, use: Use, value: Tensor) -> Tensor:
    """A quantity of the parameter in its own shape; Kronecker factors belong to the matrix that the definition says."""
    if rule.lead is None:
        return value
    if use.record.transposed:
        return value.mT
    own, shape = value.shape, use.parameter.shape
    return value if own[rule.lead :] == shape else value.reshape(*own[: rule.lead], *shape)


def joined(uses: Sequence[Use]) -> Use:
    """Uses that are `joinable`, as one with the positions of all."""
    first, factors = uses[0], [use.factor for use in uses if use.factor is not None]
    factor = _cat(factors, first.layer.output_axes, 1) if factors else None
    return _Joined(uses, factor)


class _Joined(Use):
    def __init__(self, uses: Sequence[Use], factor: Tensor | None) -> None:
        super().__init__(uses[0].record, uses[0].name, factor)
        self.uses = uses

    def _operand(self, name: str) -> Any:
        axes = {"input": self.layer.input_axes, "output": self.layer.output_axes}.get(name)
        if axes is None:
            return self.uses[0].operand(name)
        return _cat([use.operand(name) for use in self.uses], axes, 0)


def _cat(tensors: Sequence[Tensor], axes: Axes, lead: int) -> Tensor:
    """Canonical tensors as one along their starred axis."""
    star = starred(axes)
    wide = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return tensors[0] if star is None else torch.cat([tensor.to(wide) for tensor in tensors], lead + star)


def alike(uses: Sequence[Use]) -> bool:
    """Whether the uses have one Kronecker structure of the parameter."""
    return all(_structure(use) == _structure(uses[0]) for use in uses)


def _structure(use: Use) -> tuple[object, ...]:
    """The formula, the place of the parameter in it, and how many blocks its joined axes hold."""
    return use.layer.name, use.name, use.record.transposed, use.record.geometry.output_layout.extents


def joinable(uses: Sequence[Use]) -> bool:
    """Whether the uses differ in nothing but their positions, along one axis."""
    first = uses[0]
    return (
        first.layer.positional
        and alike(uses)
        and all(
            use.record.samples == first.record.samples
            and use.record.options == first.record.options
            and _without_positions(use) == _without_positions(first)
            and _same_parameters(use, first)
            for use in uses
        )
    )


def _without_positions(use: Use) -> list[int]:
    """Extents of the output's axes that neither count positions nor belong to the parameter, of which parts may be used."""
    axes = axis_names(use.layer.output_axes)
    own = {starred(use.layer.output_axes)}
    own |= {k for k, axis in enumerate(axes) if axis in axis_names(use.layer.parameter_axes[use.name])}
    return [size for k, size in enumerate(use.record.canonical_output) if k not in own]


def _same_parameters(one: Use, other: Use) -> bool:
    """Whether the parameters that the quantities read, other than by pulling back, are the same tensors."""
    rules = one.layer.parameters[one.name].values()
    read = {name for rule in rules for name in rule.operands} & one.layer.parameters.keys()
    return all(one.record.parameters.get(name) == other.record.parameters.get(name) for name in read)
