"""The data that generated modules fill: what the engine knows of a layer, a loss and a feature.

Every tensor that a rule sees is canonical: a starred axis stands for any number of axes, zero included, flattened to one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn

from .axes import Axes
from .lazy import lazy

if TYPE_CHECKING:
    from .extension import Extension

_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Rule:
    """One formula as programs: `aten` everywhere, `kernel` in the definition's Triton module where that fuses more.

    `operands` are appended as positional arguments after the explicit ones: "input", "output", "target", the name of a
    parameter, a buffer or an option. `lead`: the value is [*lead axes, *parameter], flattened as its axes are. `writes`: whether
    `aten` takes a tensor `out`, in which it computes its value where that saves memory. `heavy`: whether it takes many operations
    for each element that it reads, or writes many. `composed`: whether it takes intermediates, or many operations for each element,
    where torch may have one for all.
    """

    aten: Callable[..., Tensor]
    operands: tuple[str, ...] = ()
    kernel: str | None = None
    lead: int | None = None
    writes: bool = False
    heavy: bool = False
    composed: bool = False


@dataclass(frozen=True)
class NodeCall:
    """An autograd node that is a call of a layer although no module was called.

    name: the node's. input: what it has saved as the layer's input, and that one's position among the node's inputs; None if no
    rule of these parameters reads it.
    parameters: by name, the position among the node's inputs, and for each axis of the tensor there, which of the parameter it is.
    options: what else it has saved, with the values that the formula covers.
    """

    name: str
    input: tuple[str, int] | None
    parameters: Mapping[str, tuple[int, tuple[int, ...]]]
    options: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)


@dataclass(frozen=True, eq=False)
class Layer:
    """A module y = f(x, θ), as the rules by which curvature passes it and the quantities that it leaves on parameters.

    vjp:       v [V, *output] → Jᵀv [V, *input]; None: the input is not differentiable
    diagonal:  d [*output] → Σ_y (∂y/∂x)² d [*input]
    mean_vjp:  M [E, *output[1:]] → 1/N Σ_n J_nᵀ M [E, *input[1:]]
    sandwich:  G [*output[1:], *output[1:]] → 1/N Σ_n J_nᵀ G J_n [*input[1:], *input[1:]]
    residual:  δ [*output] → Σ_y δ_y ∂²y/∂x² [*input], of layers where it is diagonal
    hessian:   δ [*output], v [V, *input] → Σ_y δ_y ∂²y/∂x∂x′ v [V, *input], of layers where it is not; both None: zero

    `diagonal`, `mean_vjp` and `sandwich` may be None: then the engine composes them from `vjp`.
    """

    name: str
    module: type[nn.Module]
    formula: str
    kernels: str
    input_axes: Axes
    output_axes: Axes
    vjp: Rule | None
    diagonal: Rule | None
    mean_vjp: Rule | None
    sandwich: Rule | None
    residual: Rule | None
    hessian: Rule | None
    elementwise: bool
    mixed: bool
    positional: bool
    parameters: Mapping[str, Mapping[str, Rule]]
    parameter_axes: Mapping[str, Axes] = field(default_factory=lambda: _EMPTY)
    buffers: tuple[str, ...] = ()
    extents: Mapping[str, str | int] = field(default_factory=lambda: _EMPTY)
    ranks: Mapping[str, Callable[[Mapping[str, Any], int], int]] = field(default_factory=lambda: _EMPTY)
    numbers: tuple[str, ...] = ()
    operation: str = ""
    saved: tuple[str, ...] = ()
    when: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    absent: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: _EMPTY)
    reasons: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    approximation: str = "expand"
    nodes: tuple[NodeCall, ...] = ()

    @property
    def passes(self) -> tuple[Rule, ...]:
        """The rules by which curvature passes the layer."""
        rules = (self.vjp, self.diagonal, self.mean_vjp, self.sandwich, self.residual, self.hessian)
        return tuple(rule for rule in rules if rule is not None)

    @cache  # noqa: B019 (a definition is there for good)
    def reads(self, parameters: tuple[str, ...]) -> frozenset[str]:
        """Operands of the rules by which factors pass, and of the quantities of `parameters`: what a record must keep."""
        own = frozenset[str]().union(*(self.reads_of(parameter) for parameter in parameters))
        return own | {operand for rule in self.passes for operand in rule.operands}

    def reads_of(self, parameter: str) -> frozenset[str]:
        """Operands of the quantities of a parameter."""
        return frozenset(operand for rule in self.parameters[parameter].values() for operand in rule.operands)


@dataclass(frozen=True)
class OperationNode:
    """An autograd node by name; under which name it has saved a tensor or number, where that is not the formula's; what else it
    has saved, with the values that the formula covers."""

    name: str
    saved: Mapping[str, str]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Operation:
    """What an autograd node computes, y = f(inputs; operands), and its second derivative by input, the inputs in the node's order.

    hessian: δ [*output] → Σ_y δ_y ∂²y/∂x∂x′ v [V, *input], over all inputs x′; the operand `tangent_<x′>` is v [V, *x′]

    A value is that of canonical tensors, whose axes are named. `operands` are further tensors, of zeros where they are absent;
    `absent` gives a number that is, of the extents. `widest` are the axes of the largest intermediate that a column takes.
    """

    name: str
    formula: str
    inputs: Mapping[str, Axes]
    operands: Mapping[str, Axes]
    output: Axes
    widest: tuple[str, ...]
    hessian: Mapping[str, Rule]
    absent: Mapping[str, Callable[[Mapping[str, int]], float]]
    nodes: tuple[OperationNode, ...]


@dataclass(frozen=True)
class Composite:
    """A module that is made of other operations, unless a backend that fuses them is on: `without` names those to switch off."""

    module: type[nn.Module]
    without: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss Σ ℓ(f, y), times c: 1 over what its reduction divides by.

    gradient:      () → ∂/∂f Σℓ [*input]
    exact_factor:  () → S [V, *input] with S Sᵀ = ∂²(Σℓ)/∂f²
    null:          () → u [*input] ≥ 0, a unit vector over the first axis of the columns, that S maps to zero; None: there is none
    sample:        (mc_samples, generator) → ŷ [M, *outcomes]; None, and why, where the loss is no likelihood
    mc_factor:     (ŷ) → √weight · score(ŷ_m) [M, *input], of the distribution that ŷ is drawn from
    …_undefined:   () → whether what that factor is the square root of is negative; None: it cannot be
    `elements` are the axes of the terms ℓ, `columns` those whose extents multiply to V. `reductions` gives the divisor of each:
    axes whose extents multiply to it, or a rule. `operands` are further tensors with their axes, attributes of the module or
    `arguments` of its forward function; `when` and `classes` (integer targets) tell variants of one module apart.
    """

    name: str
    module: type[nn.Module]
    formula: str
    kernels: str
    input_axes: tuple[str, ...]
    target_axes: tuple[str, ...]
    elements: tuple[str, ...]
    columns: tuple[str, ...]
    gradient: Rule
    exact_factor: Rule
    reductions: Mapping[str, Rule | tuple[str, ...]]
    null: Rule | None = None
    sample: Rule | None = None
    mc_factor: Rule | None = None
    exact_factor_undefined: Rule | None = None
    mc_factor_undefined: Rule | None = None
    no_likelihood: str = ""
    classes: bool = False
    operands: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _EMPTY)
    arguments: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    when: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: _EMPTY)


#: The quantity that stands for Kronecker factors where there are none.
BLOCK = "block"


class Need(NamedTuple):
    """A quantity of a parameter, the columns that it is computed from, and the samples (None: all).

    Sources: "gradient" (δ, one column), "exact", "mc", "residual" (signed columns), "diagonal", "averaged" (Ḡ), "input" (none).
    """

    source: str
    quantity: str
    samples: tuple[int, ...] | None = None

    @property
    def curvature(self) -> bool:
        """Whether the columns start at an extended loss."""
        return self.source not in ("gradient", "input")


class Sizes(NamedTuple):
    """N samples, and the unit u of ∇ℓ_n = u·g_n: N for a mean-reduced loss, 1 for a sum, None if no extended loss was seen."""

    N: int
    unit: float | None

    @property
    def u(self) -> float:
        """The unit, where it is known: the engine refuses `scaling="table5"` before, where it is not."""
        assert self.unit is not None
        return self.unit


@dataclass(frozen=True)
class Reduction:
    """A quantity from the total, over the uses of a parameter, of one that adds.

    of:        the additive quantity
    function:  its total, then signs [V, N] or the number of `positions`, where the formula reads these → the quantity
    over:      how the values of blocks of samples combine: "columns" if each belongs to a sample, so that they stand side by side;
               "samples" if they add; "deviations" if each is Σ (T − mean_n T)², and they are merged
    second:    of "deviations", the quantity Σ T²
    """

    of: str
    function: Callable[..., Tensor]
    over: Literal["columns", "samples", "deviations"] = "samples"
    signed: bool = False
    positions: bool = False
    second: str | None = None


@dataclass(frozen=True)
class Registry:
    """Everything that is defined. A quantity without one of the `reductions` adds over the uses of a parameter.

    `factors` are the quantities of a Kronecker structure, which all uses must share.
    `passing` are modules without parameters that are piecewise linear: torch's own backward passes every factor.
    """

    layers: tuple[Layer, ...]
    passing: tuple[type[nn.Module], ...]
    losses: tuple[Loss, ...]
    extensions: tuple[type[Extension], ...]
    reductions: Mapping[str, Reduction]
    factors: frozenset[str]
    composites: tuple[Composite, ...] = ()
    operations: tuple[Operation, ...] = ()

    @lazy
    def _by_forward(self) -> Mapping[Callable[..., Any], tuple[Layer | Loss, ...]]:
        """The definitions of each forward function, those that ask for most first."""
        found: dict[Callable[..., Any], list[Layer | Loss]] = {}
        definitions: list[Layer | Loss] = [*self.layers, *self.losses]
        for definition in definitions:
            found.setdefault(definition.module.forward, []).append(definition)
        return {forward: tuple(sorted(group, key=_asks)) for forward, group in found.items()}

    @lazy
    def _passing(self) -> frozenset[Callable[..., Any]]:
        return frozenset(module.forward for module in self.passing)

    def second_moment(self, quantity: str) -> str | None:
        """Of squared deviations, the quantity Σ T²; None of any other."""
        reduction = self.reductions.get(quantity)
        return None if reduction is None else reduction.second

    def is_piecewise_linear(self, module: nn.Module) -> bool:
        """Whether a module is known to be, though it has no rules."""
        return "forward" not in vars(module) and type(module).forward in self._passing

    def definition(self, module: nn.Module) -> Layer | Loss | None:
        """By its forward function: a subclass that computes the same is the same."""
        if "forward" in vars(module):  # patched on the instance: it may compute anything
            return None
        for each in self._by_forward.get(type(module).forward, ()):
            if not each.when or _covers(each, module):
                return each
        return None

    def loss(self, module: nn.Module, target: Tensor) -> Loss:
        """The variant of a loss for a target of classes, or of numbers; the only one there is, where the target fits none."""
        classes, first = not target.is_floating_point(), None
        for loss in self._by_forward[type(module).forward]:
            if isinstance(loss, Loss) and _covers(loss, module):
                if loss.classes is classes:
                    return loss
                first = first or loss
        assert first is not None, "its definition is one"
        return first

    @lazy
    def by_node(self) -> Mapping[str, tuple[Operation, OperationNode]]:
        """The operation that an autograd node of a name is."""
        return {node.name: (operation, node) for operation in self.operations for node in operation.nodes}

    def composite(self, module: nn.Module) -> Composite | None:
        forward = type(module).forward
        return next((composite for composite in self.composites if composite.module.forward is forward), None)


def _covers(definition: Layer | Loss, module: nn.Module) -> bool:
    """Whether the module has the attributes that the definition asks for."""
    return all(getattr(module, name) == value for name, value in definition.when.items())


def _asks(definition: Layer | Loss) -> int:
    return -len(definition.when)


_installed: Registry | None = None


def install(registry: Registry) -> None:
    """Make `registry` the one that the engine serves; the package does this once, when it is imported."""
    global _installed
    _installed = registry


def registry() -> Registry:
    if _installed is None:
        raise RuntimeError("no registry is installed")
    return _installed
