"""The data that generated modules fill: what the engine knows of a layer, a loss and a feature.

Every tensor that a rule sees is canonical: a starred axis stands for any number of axes, zero included, flattened to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from .extension import Extension

_EMPTY: Mapping[str, tuple[Any, ...]] = MappingProxyType({})


@dataclass(frozen=True)
class Rule:
    """One formula as programs: `aten` everywhere, `kernel` in the definition's Triton module where that fuses more.

    `operands` are appended as positional arguments after the explicit ones: "input", "output", "target", the name of a
    parameter or of an option.
    """

    aten: Callable[..., Tensor]
    operands: tuple[str, ...] = ()
    kernel: str | None = None


@dataclass(frozen=True)
class NodeCall:
    """An autograd node that is a call of a layer although no module was called.

    name: the node's. input: what it has saved as the layer's input, None if no rule of these parameters reads that.
    parameters: by name, the position among the node's inputs, and for each axis of the tensor there, which of the parameter it is.
    options: what else it has saved, with the values that the formula covers.
    """

    name: str
    input: str | None
    parameters: Mapping[str, tuple[int, tuple[int, ...]]]
    options: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)


@dataclass(frozen=True)
class Layer:
    """A module y = f(x, θ), as the rules by which curvature passes it and the quantities that it leaves on parameters.

    vjp:       v [V, *output] → Jᵀv [V, *input]
    diagonal:  d [*output] → Σ_y (∂y/∂x)² d [*input]
    mean_vjp:  M [E, *output[1:]] → 1/N Σ_n J_nᵀ M [E, *input[1:]]
    sandwich:  G [*output[1:], *output[1:]] → 1/N Σ_n J_nᵀ G J_n [*input[1:], *input[1:]]
    residual:  δ [*output] → Σ_y δ_y ∂²y/∂x² [*input], its diagonal; None: identically zero
    """

    name: str
    module: type[nn.Module]
    formula: str
    kernels: str
    input_axes: tuple[str, ...]
    output_axes: tuple[str, ...]
    vjp: Rule
    diagonal: Rule
    mean_vjp: Rule
    sandwich: Rule
    residual: Rule | None
    elementwise: bool
    mixed: bool
    parameters: Mapping[str, Mapping[str, Rule]]
    approximation: str = "expand"
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: _EMPTY)
    nodes: tuple[NodeCall, ...] = ()

    def reads(self, parameters: Iterable[str]) -> frozenset[str]:
        """Operands of the rules by which factors pass, and of the quantities of `parameters`: what a record must keep."""
        passes = [self.vjp, self.diagonal, self.mean_vjp, self.sandwich, *([self.residual] if self.residual else [])]
        own = frozenset[str]().union(*(self.reads_of(parameter) for parameter in parameters))
        return own | {operand for rule in passes for operand in rule.operands}

    def reads_of(self, parameter: str) -> frozenset[str]:
        """Operands of the quantities of a parameter."""
        return frozenset(operand for rule in self.parameters[parameter].values() for operand in rule.operands)


@dataclass(frozen=True)
class Composite:
    """A module that is made of other operations, unless a backend that fuses them is on: `without` names those to switch off."""

    module: type[nn.Module]
    without: tuple[str, ...]


@dataclass(frozen=True)
class Loss:
    """A negative log-likelihood Σ ℓ(f, y), times c (1 for a sum, 1 / number of terms for a mean).

    gradient:      () → ∂/∂f Σℓ [*input]
    exact_factor:  () → S [V, *input] with S Sᵀ = ∂²(Σℓ)/∂f²
    sample:        (mc_samples, generator) → ŷ [M, *target]
    mc_factor:     (ŷ) → ∂/∂f Σℓ(f, ŷ_m) / √M [M, *input]
    violation:     () → whether a target lies outside the domain
    `elements` are the axes whose extents multiply to the number of terms, `columns` those that multiply to V.
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
    sample: Rule
    mc_factor: Rule
    violation: Rule | None = None
    violation_text: str = ""
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: _EMPTY)


@dataclass(frozen=True)
class Need:
    """A quantity of a parameter, and the columns that it is computed from.

    Sources: "gradient" (δ, one column), "exact", "mc", "residual" (signed columns), "diagonal", "averaged" (Ḡ), "input" (none).
    """

    source: str
    quantity: str

    @property
    def curvature(self) -> bool:
        """Whether the columns start at an extended loss."""
        return self.source not in ("gradient", "input")


@dataclass(frozen=True)
class Sizes:
    """N samples, and the unit u of ∇ℓ_n = u·g_n: N for a mean-reduced loss, 1 for a sum, None if no extended loss was seen."""

    N: int
    unit: float | None

    @property
    def u(self) -> float:
        """The unit, where it is known: the engine refuses `scaling="table5"` before, where it is not."""
        assert self.unit is not None
        return self.unit


@dataclass(frozen=True)
class Registry:
    """Everything that is defined. `reductions` give a quantity from a materialised per_sample [V, N, *p]."""

    layers: tuple[Layer, ...]
    losses: tuple[Loss, ...]
    extensions: tuple[type[Extension], ...]
    reductions: Mapping[str, Callable[..., Tensor]]
    composites: tuple[Composite, ...] = ()

    @cached_property
    def _by_forward(self) -> Mapping[Callable[..., Any], Layer | Loss]:
        definitions: list[Layer | Loss] = [*self.layers, *self.losses]
        return {definition.module.forward: definition for definition in definitions}

    def definition(self, module: nn.Module) -> Layer | Loss | None:
        """By its forward function: a subclass that computes the same is the same."""
        if "forward" in vars(module):  # patched on the instance: it may compute anything
            return None
        return self._by_forward.get(type(module).forward)

    def composite(self, module: nn.Module) -> Composite | None:
        forward = type(module).forward
        return next((composite for composite in self.composites if composite.module.forward is forward), None)


_installed: Registry | None = None


def install(registry: Registry) -> None:
    """Make `registry` the one that the engine serves; the package does this once, when it is imported."""
    global _installed
    _installed = registry


def registry() -> Registry:
    if _installed is None:
        raise RuntimeError("no registry is installed")
    return _installed
