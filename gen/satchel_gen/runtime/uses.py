"""What a parameter gets from its uses: one, several by layers of one kind, or several by any layers.

Uses of a parameter sum before they are squared. Where the layers are of one kind and have an axis that any number of positions
share, uses are more positions: their tensors are joined along it. Otherwise individual pullbacks are summed and then reduced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from .axes import Axes, starred
from .axes import names as axis_names
from .errors import SharedByKinds
from .evaluate import evaluate
from .extension import Extension
from .record import Record
from .rules import Layer, Rule, registry

PER_SAMPLE = "per_sample"
#: What stands for Kronecker factors where there are none.
BLOCKS = ("block", "averaged_block")


@dataclass(frozen=True)
class Use:
    """A parameter of a layer's call, and the canonical tensor at its output: columns [V, *output], or one [*output], or none."""

    record: Record
    name: str
    factor: Tensor | None = None

    @property
    def layer(self) -> Layer:
        return self.record.definition

    def offers(self, quantity: str) -> bool:
        return quantity in self.layer.parameters[self.name]

    def serves(self, extension: Extension) -> bool:
        """Whether a feature has a value for the parameter: what it needs of inputs alone, a bias goes without, and a diagonal can
        be had as columns."""
        needs = [need for need in extension.needs(self.layer) if need.source not in ("input", "diagonal")]
        offered = [self.offers(need.quantity) for need in needs]
        # A parameter has Kronecker factors or, without that structure, the exact block.
        return any(offered) if any(need.quantity in BLOCKS for need in needs) else all(offered)

    def block_bytes(self) -> int:
        """Size of the parameter's exact block."""
        parameter = self.record.parameter(self.name)
        return parameter.numel() ** 2 * parameter.element_size()


def quantities(
    uses: Sequence[Use], names: Iterable[str], *extra: Tensor, lead: int = 1, differentiable: bool = False
) -> dict[str, Tensor]:
    """The quantities `names` of one parameter. `lead` counts the axes in front of the factors' output axes.

    Uses that cannot be joined give reductions of their summed individual pullbacks.
    """
    names = [name for name in names if all(use.offers(name) for use in uses)]
    if not names:
        return {}
    found: dict[str, Tensor] = {}
    if len(uses) > 1 and not joinable(uses):
        if any(use.factor is None for use in uses):
            raise SharedByKinds([use.record.where for use in uses], uses[0].name, names[0])
        found[PER_SAMPLE] = reduce(add, (_one(use, PER_SAMPLE, use.factor, differentiable) for use in uses))
    elif PER_SAMPLE in names:
        found[PER_SAMPLE] = _joined(uses, PER_SAMPLE, (), lead, differentiable)
    reductions = registry().reductions
    for name in names:
        if name in found:
            continue
        if len(uses) == 1 or joinable(uses):
            # Also where the individual pullback is stored: reading it again costs more than a rule that never forms it.
            found[name] = _joined(uses, name, extra, lead, differentiable)
        elif PER_SAMPLE in found and name in reductions:
            found[name] = reductions[name](found[PER_SAMPLE], *extra)
        else:
            raise SharedByKinds([use.record.where for use in uses], uses[0].name, name)
    return {name: found[name] for name in names}


def summed(uses: Sequence[Use], name: str) -> Tensor:
    """A quantity that is additive over uses."""
    return reduce(add, (_one(use, name, use.factor) for use in uses))


def _one(use: Use, name: str, factor: Tensor | None, differentiable: bool = False) -> Tensor:
    rule = use.layer.parameters[use.name][name]
    found = evaluate(rule, use.layer, use.record.operand, factor, differentiable=differentiable)
    return shaped(rule, use, found)


def shaped(rule: Rule, use: Use, value: Tensor) -> Tensor:
    """A quantity of the parameter in its own shape; Kronecker factors belong to the matrix that the definition says."""
    if rule.lead is None:
        return value
    if use.record.transposed:
        return value.mT
    return value.reshape(*value.shape[: rule.lead], *use.record.parameter(use.name).shape)


def _joined(uses: Sequence[Use], name: str, extra: Sequence[Tensor], lead: int, differentiable: bool) -> Tensor:
    """The quantity of uses joined along their shared axis (of one use, as it is)."""
    first = uses[0]
    rule = first.layer.parameters[first.name][name]
    factors = [use.factor for use in uses if use.factor is not None]
    arguments = [*([join(factors, first.layer.output_axes, lead)] if factors else []), *extra]

    def operand(operand: str) -> Any:
        if operand not in ("input", "output"):
            return first.record.operand(operand)
        axes = first.layer.input_axes if operand == "input" else first.layer.output_axes
        return join([use.record.operand(operand) for use in uses], axes, 0)

    found = evaluate(rule, first.layer, operand, *arguments, differentiable=differentiable)
    return shaped(rule, first, found)


def join(tensors: Sequence[Tensor], axes: Axes, lead: int) -> Tensor:
    """Concatenate canonical tensors along their starred axis."""
    star = starred(axes)
    return tensors[0] if len(tensors) == 1 or star is None else torch.cat(_promoted(tensors), lead + star)


def _promoted(tensors: Sequence[Tensor]) -> list[Tensor]:
    wide = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(wide) for tensor in tensors]


def joinable(uses: Sequence[Use]) -> bool:
    """Whether the uses differ in nothing but their positions."""
    first = uses[0]
    return first.layer.positional and all(
        use.layer is first.layer
        and use.name == first.name
        and use.record.samples == first.record.samples
        and use.record.options == first.record.options
        and use.record.transposed == first.record.transposed
        and _without_positions(use) == _without_positions(first)
        and _same_parameters(use, first)
        for use in uses
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
