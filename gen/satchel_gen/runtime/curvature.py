"""What happens when a backward reaches an extended loss: every factor starts here and is swept over the plan at once.

Nothing has been freed yet below the loss, and no parameter has got a field: whatever can be refused is refused first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, partial
from math import inf, nan, prod
from typing import Any

import torch
from torch import Tensor

from .averaged import Pair, averaged_quantities, needed_bytes, start_of, sweep_averaged
from .axes import Layout, extents
from .calls import Call
from .demand import AVERAGED, CURVATURE, DIAGONAL, EXACT, RESIDUAL, SECOND_ORDER, Demand, Source
from .diagonals import Accumulate, Diagonals
from .errors import (
    BatchAxisLost,
    MemoryLimit,
    NegativeCurvature,
    NegativeScale,
    NoLikelihood,
    NotTwiceDifferentiable,
    OperandDifferentiated,
    SequentialReuse,
    TargetRefused,
    UnsupportedOption,
)
from .evaluate import computed, evaluate
from .flags import Flag, first_raised
from .hessian import HessianSweep, may_add, residuals_of
from .householder import independent
from .lazy import lazy
from .mixed import parameter_terms
from .plan import Place, Plan, Step
from .quantities import summed
from .record import Edge, LossRecord, Record
from .rules import Layer, registry
from .second import is_twice_differentiable
from .settings import current
from .subsampling import quantities_of
from .sweep import AT_ONCE, at_edge, chunks, sweep
from .torch_private import current_node, weight_of_targets
from .uses import PER_SAMPLE, Use

#: Kinds whose columns can be swept in ranges.
STREAMED = ("exact", "mc", "residual")


class Start:
    """The factors of one extended loss, scaled by c·g: c from its reduction, g the gradient that arrives."""

    def __init__(self, loss: LossRecord, gradient: Tensor) -> None:
        assert loss.edge is not None
        self.loss, self.edge, self.definition = loss, loss.edge, loss.definition
        self.samples = loss.input_shape[0]
        shape = Layout.of(self.definition.input_axes).canonical_shape(loss.input_shape)
        assert shape is not None
        self.sizes = extents(self.definition.input_axes, shape)
        #: g; a number where reading it waits for no device.
        self.arriving: Tensor | float = self._number_or_by_term(gradient.detach())
        divisor = self._divisor(loss.options["reduction"])
        if not isinstance(self.arriving, Tensor):
            divisor = float(divisor) or nan  # 0 where all targets are ignored: then torch's loss is nan, too
        #: c·g, likewise.
        self.scale: Tensor | float = self.arriving / divisor

    def _number_or_by_term(self, gradient: Tensor) -> Tensor | float:
        """The gradient of the loss, or of each term, without a reduction, along the axes of the input."""
        if gradient.ndim == 0:
            return gradient.item() if gradient.is_cpu else gradient
        terms = self.definition.elements
        return gradient.reshape([size if axis in terms else 1 for axis, size in self.sizes.items()])

    def _divisor(self, reduction: str) -> Tensor | float:
        """What the reduction divides by, 1 / c."""
        divisor = self.definition.reductions.get(reduction, ())
        if isinstance(divisor, tuple):
            return max(prod(self.sizes[axis] for axis in divisor), 1)
        known = None if self.loss.checkpointed or reduction != "mean" else weight_of_targets(current_node())
        return evaluate(divisor, self.definition, self.loss.operand) if known is None else known

    def flags(self, demand: Demand, layers: Sequence[Layer]) -> list[Flag]:
        """What can only be known from values: read once, when the pass ends."""
        definition, loss = self.definition, self.loss
        found: list[Flag] = []
        if isinstance(self.arriving, Tensor) or not 0 <= self.arriving < inf:
            arriving = torch.as_tensor(self.arriving)
            valid = ((arriving >= 0) & (arriving < inf)).all()
            found.append((~valid, NegativeScale(loss.where, demand.features(layers, *CURVATURE))))
        factors = (
            (definition.exact_factor_undefined, ("exact", "averaged")),
            (definition.mc_factor_undefined, ("mc",)),
        )
        for undefined, kinds in factors:
            features = demand.features(layers, *kinds)
            if features and undefined is not None:
                error = NegativeCurvature(loss.where, features)
                found.append((evaluate(undefined, definition, loss.operand), error))
        return found

    def exact(self, every: bool) -> Tensor:
        """S [V, *edge], S Sᵀ = c g ∇²Σℓ; `every` column, or without dependent ones."""
        definition, operand = self.definition, self.loss.operand
        factor = evaluate(definition.exact_factor, definition, operand)
        if definition.null is not None and not every:
            null = evaluate(definition.null, definition, operand)
            factor = independent(factor, null, definition.input_axes.index(definition.columns[0]))
        return self._factor(factor)

    def monte_carlo(self, source: Source) -> Tensor:
        """[M, *edge], √(c g / M) times the scores at targets drawn from the loss's distribution."""
        rule = self.definition.mc_factor
        assert rule is not None, "a loss without one is refused before"
        drawn = self._drawn(source.mc_samples or 1, source.generator)
        return self._factor(evaluate(rule, self.definition, self.loss.operand, drawn), drawn.shape[0])

    @lazy
    def gradient(self) -> Tensor:
        """δ [*edge] = c g ∇Σℓ."""
        delta = evaluate(self.definition.gradient, self.definition, self.loss.operand)
        return at_edge(_scaled(delta, self.scale), self.edge, lead=0)

    def _factor(self, factor: Tensor, draws: int = 1) -> Tensor:
        scale = self.scale / draws
        root = scale.abs().sqrt() if isinstance(scale, Tensor) else abs(scale) ** 0.5
        return at_edge(_scaled(factor, root), self.edge, lead=1)

    def _drawn(self, mc_samples: int, generator: torch.Generator | None) -> Tensor:
        """Targets, drawn where the generator lives."""
        here = self.loss.tensor("input").device
        there = here if generator is None else generator.device

        def operand(name: str) -> Any:
            value = self.loss.operand(name)
            return value.to(there) if isinstance(value, Tensor) else value

        # Not `evaluate`: random numbers come from torch on every backend.
        rule = self.definition.sample
        assert rule is not None
        return computed(rule, self.definition, [mc_samples, generator, *map(operand, rule.operands)]).to(here)


def _scaled(tensor: Tensor, scale: Tensor | float) -> Tensor:
    return tensor * (scale.to(tensor.dtype) if isinstance(scale, Tensor) else scale)


def check_loss(loss: LossRecord, demand: Demand, layers: Sequence[Layer]) -> None:
    """Refuse options and targets that the definition does not cover, and features that it does not define."""
    features, sampled = demand.features(layers, *CURVATURE), demand.features(layers, "mc")
    for option, supported in {"reduction": (*loss.definition.reductions, "none"), **loss.definition.options}.items():
        refuse_option(loss, option, loss.options[option], supported, features)
    if sampled and loss.definition.mc_factor is None:
        raise NoLikelihood(loss.where, sampled, loss.definition.no_likelihood)
    if loss.differentiated:
        raise OperandDifferentiated(loss.where, loss.differentiated, features)
    definition, target = loss.definition, loss.tensor("target")
    shape = Layout.of(definition.input_axes).canonical_shape(loss.input_shape)
    if shape is None:
        raise BatchAxisLost(loss.where, loss.input_shape, None)
    other = Layout.of(definition.target_axes).canonical_shape(target.shape)
    if other is None or not _agree(definition.input_axes, shape, definition.target_axes, other):
        reason = f"a target of shape {tuple(target.shape)} does not fit an input of shape {loss.input_shape} with axes"
        raise TargetRefused(loss.where, f"{reason} {definition.input_axes} and {definition.target_axes}")


@lru_cache(maxsize=1 << 10)
def _agree(axes: tuple[str, ...], shape: tuple[int, ...], others: tuple[str, ...], other: tuple[int, ...]) -> bool:
    sizes, more = extents(axes, shape), extents(others, other)
    return all(sizes.get(axis, extent) == extent for axis, extent in more.items())


def refuse_option(
    record: Record | LossRecord,
    option: str,
    value: object,
    supported: tuple[object, ...],
    features: list[str],
    reason: str = "",
) -> None:
    if not supported:
        return
    for one in supported:
        if value is one or (not isinstance(value, Tensor) and value == one):
            return
    raise UnsupportedOption(record.where, option, value, supported, features, reason)


def check_plan(plan: Plan, demand: Demand, samples: int, flags: Sequence[Flag]) -> None:
    """Refuse what second-order features cannot do on this graph."""
    layers = plan.definitions
    sources = demand.sources(layers)
    if RESIDUAL in sources or AVERAGED in sources:
        for step in plan.steps:
            _refuse_second_order(step, samples, demand.features(layers, *SECOND_ORDER))
    if RESIDUAL in sources:
        for step in plan.unknown:
            refused = [call.record.where for call in step.calls if not call.twice_differentiable]
            if refused or not is_twice_differentiable(step):
                # Mixed samples are the deeper reason.
                where = refused[0] if refused else step.where
                raise first_raised(flags) or NotTwiceDifferentiable(where, demand.features(layers, "residual"))
    for places in plan.uses.values():
        if RESIDUAL in sources and (use := _mixed_without_rule(plan, places)) is not None:
            raise SequentialReuse(use.record.where, use.name, demand.features(layers, "residual"))
    limit = current().memory_limit
    if limit is None:
        return
    itemsize = torch.finfo(torch.get_default_dtype()).bits // 8
    column = plan.column_bytes(itemsize)
    if column > limit and (streamed := [source for source in sources if source.kind in STREAMED]):
        raise MemoryLimit(demand.features(layers, *(source.kind for source in streamed)), "one column", column, limit)
    if AVERAGED in sources:
        needed, where = needed_bytes(plan, samples, itemsize)
        if needed > limit:
            raise MemoryLimit(demand.features(layers, "averaged"), where, needed, limit)


def _refuse_second_order(step: Step, samples: int, features: list[str]) -> None:
    """These features want the batch first."""
    record = step.record
    if record is not None and record.output_shape[0] != samples:
        raise BatchAxisLost(record.where, record.output_shape, samples)


def _mixed_without_rule(plan: Plan, places: Sequence[Place]) -> Use | None:
    """A use with another below it whose ∂²y/∂θ∂x is not zero and cannot be had from its rules."""
    nodes = {place.step.node for place in places}
    for place in places:
        use = place.use
        reads_output = use.layer.mixed and "output" in use.layer.parameters[use.name][PER_SAMPLE].operands
        if reads_output and not plan.below(place.step.node).isdisjoint(nodes):
            return use
    return None


def run(start: Start, plan: Plan, demand: Demand, accumulate: Accumulate) -> None:
    """All sweeps that start at one loss."""
    sources = demand.sources(plan.definitions)
    averaged = AVERAGED in sources
    exact = start.exact(_every(plan, demand)) if averaged or EXACT in sources else None
    diagonals = Diagonals(demand, plan.tied)
    for source in sources:
        if source == EXACT and exact is not None:
            _columns(start.edge, exact, plan, _Gathered(source, demand, plan.tied, accumulate, diagonals))
        elif source.kind == "mc":
            factor = start.monte_carlo(source)
            _columns(start.edge, factor, plan, _Gathered(source, demand, plan.tied, accumulate))
    if RESIDUAL in sources or DIAGONAL in sources:
        _residual(start, plan, demand, accumulate, diagonals)
    diagonals.finish(accumulate)
    if averaged and exact is not None:

        def visit(parameter: Tensor, pairs: Sequence[Pair]) -> None:
            needs = demand.needs([pair.one.layer for pair in pairs], AVERAGED)
            accumulate(parameter, AVERAGED, averaged_quantities(pairs, needs))

        sweep_averaged(plan, start.edge, start_of(exact, start.samples), start.samples, visit)


def _every(plan: Plan, demand: Demand) -> bool:
    """Whether dependent columns are kept: a user sees them, or no step passes them on, which is less than leaving them out takes."""
    shown = any(need.quantity == PER_SAMPLE for need in demand.needs(plan.definitions, EXACT))
    return shown or not any(step.inputs for step in plan.steps)


def _columns(edge: Edge, factor: Tensor, plan: Plan, gathered: _Gathered) -> None:
    """Sweep a factor, in ranges of its columns that stay below the memory limit."""
    most = current().matrix_bytes // max(plan.column_bytes(factor.element_size()), 1) if factor.shape[0] > 1 else 1
    for columns in chunks(factor, most):
        sweep(plan, {edge: columns}, gathered.visit, None if plan.tied else AT_ONCE)
        gathered.finish()


def _residual(start: Start, plan: Plan, demand: Demand, accumulate: Accumulate, diagonals: Diagonals) -> None:
    """Sweep what the steps themselves add to the curvature."""
    if not any(may_add(plan, step) for step in plan.steps):  # as in a network of linear layers and rectifiers
        return

    def visit_diagonal(call: Call, diagonal: Tensor) -> None:
        if diagonals.take(call, diagonal):
            return
        for name, parameter in call.parameters.items():
            use = Use(call.record, name, diagonal)
            needs = [need for need in demand.needs([use.layer], DIAGONAL) if use.offers(need.quantity)]
            accumulate(parameter, DIAGONAL, {need: summed([use], need.quantity) for need in needs})

    delta = start.gradient
    residuals, at_uses = residuals_of(plan, {start.edge: delta}, start.samples)
    gather = partial(_Gathered, RESIDUAL, demand, plan.tied, accumulate, diagonals)
    limit, itemsize = current().matrix_bytes, delta.element_size()
    HessianSweep(plan, residuals, start.samples, gather, visit_diagonal, limit, itemsize).run()
    reductions = registry().reductions
    for step in plan.steps:
        if step.node not in at_uses:
            continue
        for call, parameter, pullback, signs in parameter_terms(plan, step, at_uses[step.node], limit):
            needs = demand.needs([call.record.definition], RESIDUAL)
            found = {need: reductions[need.quantity].function(pullback, signs) for need in needs}
            accumulate(parameter, RESIDUAL, found)


class _Gathered:
    """Turns columns of one space into quantities of parameters; those of a shared parameter once all its uses are in."""

    def __init__(
        self,
        source: Source,
        demand: Demand,
        shared: Collection[int],
        accumulate: Accumulate,
        diagonals: Diagonals | None = None,
    ) -> None:
        self.source, self.demand, self.shared, self.accumulate = source, demand, shared, accumulate
        self.diagonals = diagonals
        self.waiting: dict[int, tuple[Tensor, list[Use], tuple[Tensor, ...]]] = {}

    def visit(self, call: Call, factor: Tensor, *signs: Tensor) -> None:
        if self.diagonals is not None and self.diagonals.take_columns(call, factor, *signs):
            return
        memo: dict[Callable[..., Tensor], Tensor] = {}
        for name, parameter in call.parameters.items():
            use = Use(call.record, name, factor, memo)
            if id(parameter) in self.shared:
                self.waiting.setdefault(id(parameter), (parameter, [], signs))[1].append(use)
            else:
                self._add(parameter, [use], signs)

    def finish(self) -> None:
        for parameter, uses, signs in self.waiting.values():
            self._add(parameter, uses, signs)
        self.waiting.clear()

    def _add(self, parameter: Tensor, uses: list[Use], signs: tuple[Tensor, ...]) -> None:
        needs = self.demand.needs([use.layer for use in uses], self.source)
        self.accumulate(parameter, self.source, quantities_of(uses, needs, *signs))
