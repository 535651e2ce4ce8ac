"""Which quantities the active features need of a layer, by the columns that they are computed from."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch

from .extension import Extension
from .lazy import lazy
from .rules import BLOCK, Layer, Need, registry


class Source(NamedTuple):
    """Where columns come from. Monte-Carlo features share a sample if they agree on its size and generator."""

    kind: str
    mc_samples: int | None = None
    generator: torch.Generator | None = None


GRADIENT, INPUT, EXACT, RESIDUAL, DIAGONAL, AVERAGED = map(
    Source, ("gradient", "input", "exact", "residual", "diagonal", "averaged")
)


def source(extension: Extension, need: Need) -> Source:
    return Source("mc", extension.mc_samples or 1, extension.generator) if need.source == "mc" else Source(need.source)


class Duty(NamedTuple):
    """What the features make of a parameter: the places of those that have a value, what each of these asks for, and what all of
    them ask of δ and of inputs alone."""

    features: tuple[int, ...]
    asked: tuple[tuple[tuple[Source, Need], ...], ...]
    gradient: tuple[Need, ...]
    input: tuple[Need, ...]


@dataclass
class _Known:
    """What features of given options ask for, which holds for every pass: features go by their position."""

    asked: dict[tuple[int, Layer], tuple[tuple[Source, Need], ...]] = field(default_factory=dict)
    by_layer: dict[Layer, Mapping[Source, tuple[Need, ...]]] = field(default_factory=dict)
    serving: dict[tuple[Layer, str], tuple[int, ...]] = field(default_factory=dict)
    duties: dict[tuple[tuple[Layer, str], ...], Duty] = field(default_factory=dict)
    reads: dict[tuple[Layer, tuple[str, ...], bool], frozenset[str]] = field(default_factory=dict)
    sources: dict[tuple[Layer, ...], tuple[Source, ...]] = field(default_factory=dict)
    features: dict[tuple[tuple[Layer, ...], tuple[str, ...]], list[str]] = field(default_factory=dict)
    deviations: dict[Layer, tuple[str, ...]] = field(default_factory=dict)
    of_diagonals: dict[Layer, Mapping[Need, Need]] = field(default_factory=dict)
    surveyed: dict[Hashable, Any] = field(default_factory=dict)

    @staticmethod
    def of(extensions: Sequence[Extension]) -> _Known:
        try:
            return _known(tuple((type(extension), *vars(extension).items()) for extension in extensions))
        except TypeError:  # an option of a user's own feature that has no hash
            return _Known()


@lru_cache
def _known(options: tuple[object, ...]) -> _Known:
    return _Known()


class Demand:
    """The needs of several features, joined."""

    def __init__(self, extensions: Sequence[Extension]) -> None:
        self.extensions = tuple(extensions)
        self._places = {id(extension): place for place, extension in enumerate(self.extensions)}
        self._known = _Known.of(self.extensions)

    def asked(self, extension: Extension, layer: Layer) -> tuple[tuple[Source, Need], ...]:
        """What one feature asks for, in its order."""
        known, key = self._known.asked, (self._places[id(extension)], layer)
        if key not in known:
            known[key] = tuple((source(extension, need), need) for need in extension.needs(layer))
        return known[key]

    def of(self, layer: Layer) -> Mapping[Source, tuple[Need, ...]]:
        """Needs by source, each once."""
        known = self._known.by_layer
        if layer not in known:
            found: dict[Source, dict[Need, None]] = {}
            for extension in self.extensions:
                for key, need in self.asked(extension, layer):
                    found.setdefault(key, {})[need] = None
            known[layer] = {key: tuple(needs) for key, needs in found.items()}
        return known[layer]

    def needs(self, layers: Sequence[Layer], source: Source) -> tuple[Need, ...]:
        if len(layers) == 1:
            return self.of(layers[0]).get(source, ())
        found = [self.of(layer).get(source, ()) for layer in layers]
        return tuple(dict.fromkeys(chain.from_iterable(found)))

    def deviations(self, layer: Layer) -> tuple[str, ...]:
        """What is needed of δ that Σ T² and Σ T serve, too."""
        known = self._known.deviations
        if layer not in known:
            needs = self.of(layer).get(GRADIENT, ())
            known[layer] = tuple(need.quantity for need in needs if registry().second_moment(need.quantity))
        return known[layer]

    def of_diagonals(self, layer: Layer) -> Mapping[Need, Need]:
        """What is asked of a diagonal, with what is asked of exact columns; nothing where a feature does not add these."""
        known = self._known.of_diagonals
        if layer not in known:
            found: dict[Need, Need] = {}
            for extension in self.extensions:
                asked = self.asked(extension, layer)
                parts = [[need for key, need in asked if key == kind] for kind in (EXACT, RESIDUAL, DIAGONAL)]
                alike = len(set(map(len, parts))) == 1 and all(need.samples is None for need in parts[0])
                if any(parts) and not (extension.additive and alike):
                    found.clear()
                    break
                found |= zip(parts[2], parts[0], strict=True)
            known[layer] = found
        return known[layer]

    def serving(self, layer: Layer, parameter: str) -> tuple[Extension, ...]:
        """The features that have a value for a parameter."""
        known, key = self._known.serving, (layer, parameter)
        if key not in known:
            known[key] = tuple(k for k, e in enumerate(self.extensions) if self._serves(e, layer, parameter))
        places = known[key]
        return self.extensions if len(places) == len(self.extensions) else tuple(self.extensions[k] for k in places)

    def duty(self, uses: tuple[tuple[Layer, str], ...]) -> Duty:
        """What the features make of a parameter, by the layers that use it and what it is called there."""
        known = self._known.duties
        if uses not in known:
            layers = [layer for layer, _ in uses]
            first, *others = [self.serving(*use) for use in uses]
            serving = [extension for extension in first if all(extension in other for other in others)]
            known[uses] = Duty(
                tuple(self._places[id(extension)] for extension in serving),
                tuple(self.asked(extension, layers[0]) for extension in serving),
                self.needs(layers, GRADIENT),
                self.needs(layers, INPUT),
            )
        return known[uses]

    def _serves(self, extension: Extension, layer: Layer, parameter: str) -> bool:
        """What it needs of inputs alone, a bias goes without, and a diagonal can be had as columns."""
        needs = [need for key, need in self.asked(extension, layer) if key.kind not in ("input", "diagonal")]
        offered = [need.quantity in layer.parameters[parameter] for need in needs]
        # A parameter has Kronecker factors or, without that structure, the exact block.
        return any(offered) if self.asks(extension, layer, BLOCK) else all(offered)

    def reads(self, layer: Layer, parameters: tuple[str, ...], passed: bool) -> frozenset[str]:
        """Operands of the rules that will run for some parameters of a layer, and for the columns that it passes on."""
        known, key = self._known.reads, (layer, parameters, passed)
        if key not in known:
            needed = self.of(layer)
            kinds = {source.kind for source in needed}
            names = {need.quantity for needs in needed.values() for need in needs}
            rules = [rule for p in parameters for name, rule in layer.parameters[p].items() if name in names]
            if passed and not kinds.isdisjoint(CURVATURE):
                vjp = [layer.vjp] if layer.vjp is not None else []
                rules += vjp if kinds.isdisjoint(SECOND_ORDER) else layer.passes
            known[key] = frozenset(operand for rule in rules for operand in rule.operands)
        return known[key]

    def asks(self, extension: Extension, layer: Layer, quantity: str) -> bool:
        return any(need.quantity == quantity for _, need in self.asked(extension, layer))

    def sources(self, layers: Iterable[Layer]) -> tuple[Source, ...]:
        """The sources of what is needed of some layers."""
        known, key = self._known.sources, tuple(layers)
        if key not in known:
            known[key] = tuple(dict.fromkeys(source for layer in key for source in self.of(layer)))
        return known[key]

    def features(self, layers: Iterable[Layer], *kinds: str) -> list[str]:
        """Names of the features that need columns of one of `kinds`."""
        known, key = self._known.features, (tuple(layers), kinds)
        if key not in known:
            known[key] = [
                extension.name
                for extension in self.extensions
                if any(source.kind in kinds for layer in key[0] for source, _ in self.asked(extension, layer))
            ]
        return known[key]

    @property
    def surveyed(self) -> MutableMapping[Hashable, Any]:
        """What surveys have found, by the structure of their plan (structure.py)."""
        return self._known.surveyed

    @lazy
    def names(self) -> list[str]:
        return [extension.name for extension in self.extensions]

    @lazy
    def differentiable(self) -> bool:
        """Whether a field can be differentiated."""
        return any(extension.differentiable for extension in self.extensions)


#: Kinds of columns that start at an extended loss.
CURVATURE = ("exact", "mc", "residual", "diagonal", "averaged")
#: Those that arise only below a layer that is curved itself.
RESIDUALS = ("residual", "diagonal")
#: Kinds that need second derivatives of whatever they pass: a node without definition must be linear.
SECOND_ORDER = (*RESIDUALS, "averaged")
