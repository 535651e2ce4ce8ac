"""What a parameter gets from its uses: one, several by layers of one kind, or several by any layers.

Several uses are one with more outputs. Where the layers are of one kind and have an axis that any number of positions share, their
tensors are joined along it. Otherwise what adds over the uses (individual pullbacks, say) is summed, and all else is reduced from that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from operator import add
from typing import Any

import torch
from torch import Tensor

from . import cost
from .axes import Axes, starred
from .axes import names as axis_names
from .blocks import Blockwise, in_blocks
from .cost import Program, cheapest
from .errors import SharedByKinds
from .evaluate import evaluate, uses_kernel
from .extension import Extension
from .memory import FRESH
from .precision import widened
from .record import Record
from .rules import Layer, Rule, registry

PER_SAMPLE = "per_sample"
#: What stands for Kronecker factors where there are none.
BLOCK = "block"


@dataclass(frozen=True)
class Use:
    """A parameter of a layer's call, and the canonical tensor at its output: columns [V, *output], or one [*output], or none.

    memo: what the parameters of one call have in common: values of rules that read the factor alone.
    """

    record: Record
    name: str
    factor: Tensor | None = None
    memo: dict[Callable[..., Tensor], Tensor] = field(default_factory=dict, compare=False, repr=False)

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
        return any(offered) if any(need.quantity == BLOCK for need in needs) else all(offered)

    def value(self, name: str, *arguments: Tensor, differentiable: bool = False) -> Tensor:
        """A quantity of the use, from what its rule takes."""
        rule = self.layer.parameters[self.name][name]
        found = evaluate(rule, self.layer, self.record.operand, *arguments, differentiable=differentiable)
        return shaped(rule, self, found)

    @property
    def positions(self) -> int:
        """How many elements of a sample's output share an element of the parameter: the extent of the axes that it lacks."""
        own = axis_names(self.layer.parameter_axes[self.name])
        _, *sizes = zip(axis_names(self.layer.output_axes), self.record.canonical_output, strict=True)
        return prod(size for axis, size in sizes if axis not in own)

    def block_bytes(self) -> int:
        """Size of the parameter's exact block."""
        parameter = self.record.parameter(self.name)
        return parameter.numel() ** 2 * parameter.element_size()


def quantities(
    uses: Sequence[Use], names: Iterable[str], *extra: Tensor, lead: int = 1, differentiable: bool = False
) -> dict[str, Tensor]:
    """The quantities `names` of one parameter. `lead` counts the axes in front of the factors' output axes."""
    names = [name for name in names if all(use.offers(name) for use in uses)]
    if len(uses) > 1 and not joinable(uses):
        return _totalled(uses, names, extra, differentiable)
    return _of_joined(uses, names, extra, lead, differentiable)


def _totalled(
    uses: Sequence[Use], names: Iterable[str], extra: Sequence[Tensor], differentiable: bool
) -> dict[str, Tensor]:
    """Totals of what is additive over uses, and reductions of these."""
    totals: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name in names:
        if name in registry().factors and not alike(uses):
            raise SharedByKinds([use.record.where for use in uses], uses[0].name, name)
        reduction = registry().reductions.get(name)
        of = name if reduction is None else reduction.of
        if of not in totals:
            totals[of] = summed(uses, of, differentiable)
        if reduction is None:
            found[name] = totals[of]
        else:
            more = [sum(use.positions for use in uses)] if reduction.positions else extra
            found[name] = reduction.function(totals[of], *more)
    return found


def summed(uses: Sequence[Use], name: str, differentiable: bool = False) -> Tensor:
    """A quantity that is additive over uses."""
    given = [(use, () if use.factor is None else (use.factor,)) for use in uses]
    return reduce(add, (use.value(name, *factor, differentiable=differentiable) for use, factor in given))


def shaped(rule: Rule, use: Use, value: Tensor) -> Tensor:
    """A quantity of the parameter in its own shape; Kronecker factors belong to the matrix that the definition says."""
    if rule.lead is None:
        return value
    if use.record.transposed:
        return value.mT
    return value.reshape(*value.shape[: rule.lead], *use.record.parameter(use.name).shape)


def _of_joined(
    uses: Sequence[Use], names: Sequence[str], extra: tuple[Tensor, ...], lead: int, differentiable: bool
) -> dict[str, Tensor]:
    """Quantities of uses joined along their shared axis (of one use, as it is).

    What is cheapest by blocks of individual pullbacks shares these.
    """
    first = uses[0]
    rules = first.layer.parameters[first.name]
    factors = [use.factor for use in uses if use.factor is not None]
    arguments = [*([join(factors, first.layer.output_axes, lead)] if factors else [])]
    each = first.record.parameter(first.name).numel()
    known: dict[str, Any] = {}

    def operand(operand: str) -> Any:
        if operand not in known:
            known[operand] = _joined_operand(uses, operand)
        return known[operand]

    def given(name: str) -> list[Any]:
        return [*arguments, *(extra if name != PER_SAMPLE else ())]

    found = {} if differentiable or lead != 1 or not factors else _cheapest(rules, names, given, operand, each)
    memo = first.memo if len(uses) == 1 else {}
    for name in names:
        if name not in found:
            rule = rules[name]
            found[name] = (
                memo[rule.aten]
                if rule.aten in memo
                else evaluate(rule, first.layer, operand, *given(name), differentiable=differentiable)
            )
            if not rule.operands:
                memo[rule.aten] = found[name]
    return {name: shaped(rules[name], first, found[name]) for name in names}


def _cheapest(
    rules: Mapping[str, Rule],
    names: Sequence[str],
    given: Callable[[str], list[Any]],
    operand: Callable[[str], Any],
    each: int,
) -> dict[str, Tensor]:
    """What has several programs, by its cheapest; and individual pullbacks, where blocks of them serve that, too."""
    best: dict[str, Program] = {}
    values: dict[str, list[Any]] = {}
    blocked: dict[str, Program] = {}
    for name in names:
        rule = rules[name]
        if not isinstance(rule.aten, cheapest):
            continue
        own = [*given(name), *map(operand, rule.operands)]
        if not uses_kernel(rule, own):
            programs = rule.aten.valid(*own)
            best[name], values[name] = min(programs, key=lambda program: program.seconds(cost.machine)), own
            blocked.update((name, program) for program in programs if isinstance(program.function, Blockwise))
    found = _in_blocks(rules, names, given, operand, each, best, blocked)
    rest = {name: program.function for name, program in best.items() if name not in found}
    return found | {name: widened(function)(*values[name]) for name, function in rest.items()}


def _in_blocks(
    rules: Mapping[str, Rule],
    names: Sequence[str],
    given: Callable[[str], list[Any]],
    operand: Callable[[str], Any],
    each: int,
    best: Mapping[str, Program],
    blocked: Mapping[str, Program],
) -> dict[str, Tensor]:
    """What is cheapest by blocks of the same individual pullbacks, and these where they are asked for."""
    rule, (factor, *_) = rules[PER_SAMPLE], given(PER_SAMPLE)
    keep = PER_SAMPLE in names and not uses_kernel(rule, [factor])
    if not keep and not any(best[name] is program for name, program in blocked.items()):
        return {}
    together = [
        name
        for name, program in blocked.items()
        if best[name] is program or program.among_others(cost.machine) <= best[name].seconds(cost.machine)
    ]
    stored = each * prod(factor.shape[:2]) * factor.element_size()
    if len(together) + keep < 2 and not (keep and stored >= FRESH):
        return {}
    found, kept = in_blocks(
        rule.aten,
        {name: registry().reductions[name] for name in together},
        factor,
        [operand(name) for name in rule.operands],
        each,
        given(together[0])[1:] if together else [],
        by_sample=sum(name in ("input", "output") for name in rule.operands),
        keep=keep,
    )
    return found if kept is None else found | {PER_SAMPLE: kept}


def _joined_operand(uses: Sequence[Use], operand: str) -> Any:
    layer = uses[0].layer
    if operand not in ("input", "output"):
        return uses[0].record.operand(operand)
    axes = layer.input_axes if operand == "input" else layer.output_axes
    return join([use.record.operand(operand) for use in uses], axes, 0)


def join(tensors: Sequence[Tensor], axes: Axes, lead: int) -> Tensor:
    """Concatenate canonical tensors along their starred axis."""
    star = starred(axes)
    return tensors[0] if len(tensors) == 1 or star is None else torch.cat(_promoted(tensors), lead + star)


def _promoted(tensors: Sequence[Tensor]) -> list[Tensor]:
    wide = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(wide) for tensor in tensors]


def alike(uses: Sequence[Use]) -> bool:
    """Whether the uses have one Kronecker structure of the parameter."""
    return all(_structure(use) == _structure(uses[0]) for use in uses)


def _structure(use: Use) -> tuple[object, ...]:
    """The formula, the place of the parameter in it, and how many blocks its joined axes hold."""
    return use.layer.name, use.name, use.record.transposed, use.record.output_layout.extents


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
