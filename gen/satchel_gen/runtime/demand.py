"""Which quantities the active features need of a layer, by the columns that they are computed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch

from .extension import Extension
from .rules import BLOCK, Layer, Need


class Source(NamedTuple):
    """Where columns come from. Monte-Carlo features share a sample if they agree on its size and generator."""

    kind: str
    mc_samples: int | None = None
    generator: torch.Generator | None = None


def source(extension: Extension, need: Need) -> Source:
    return Source("mc", extension.mc_samples or 1, extension.generator) if need.source == "mc" else Source(need.source)


class Demand:
    """The needs of several features, joined."""

    def __init__(self, extensions: Sequence[Extension]) -> None:
        self.extensions = tuple(extensions)
        self._asked: dict[tuple[int, Layer], tuple[tuple[Source, Need], ...]] = {}
        self._by_layer: dict[Layer, Mapping[Source, tuple[Need, ...]]] = {}
        self._serving: dict[tuple[Layer, str], tuple[Extension, ...]] = {}

    def asked(self, extension: Extension, layer: Layer) -> tuple[tuple[Source, Need], ...]:
        """What one feature asks for, in its order."""
        key = id(extension), layer
        if key not in self._asked:
            self._asked[key] = tuple((source(extension, need), need) for need in extension.needs(layer))
        return self._asked[key]

    def of(self, layer: Layer) -> Mapping[Source, tuple[Need, ...]]:
        """Needs by source, each once."""
        if layer not in self._by_layer:
            found: dict[Source, dict[Need, None]] = {}
            for extension in self.extensions:
                for key, need in self.asked(extension, layer):
                    found.setdefault(key, {})[need] = None
            self._by_layer[layer] = {key: tuple(needs) for key, needs in found.items()}
        return self._by_layer[layer]

    def needs(self, layers: Iterable[Layer], source: Source) -> tuple[Need, ...]:
        found = [self.of(layer).get(source, ()) for layer in layers]
        return found[0] if len(found) == 1 else tuple(dict.fromkeys(chain.from_iterable(found)))

    def serving(self, layer: Layer, parameter: str) -> tuple[Extension, ...]:
        """The features that have a value for a parameter."""
        key = layer, parameter
        if key not in self._serving:
            self._serving[key] = tuple(e for e in self.extensions if self._serves(e, layer, parameter))
        return self._serving[key]

    def _serves(self, extension: Extension, layer: Layer, parameter: str) -> bool:
        """What it needs of inputs alone, a bias goes without, and a diagonal can be had as columns."""
        needs = [need for key, need in self.asked(extension, layer) if key.kind not in ("input", "diagonal")]
        offered = [need.quantity in layer.parameters[parameter] for need in needs]
        # A parameter has Kronecker factors or, without that structure, the exact block.
        return any(offered) if self.asks(extension, layer, BLOCK) else all(offered)

    def asks(self, extension: Extension, layer: Layer, quantity: str) -> bool:
        return any(need.quantity == quantity for _, need in self.asked(extension, layer))

    def sources(self, layers: Iterable[Layer]) -> list[Source]:
        return list(dict.fromkeys(source for layer in layers for source in self.of(layer)))

    def features(self, layers: Iterable[Layer], *kinds: str) -> list[str]:
        """Names of the features that need columns of one of `kinds` (of any kind, if none is given)."""
        layers = list(layers)
        return [
            extension.name
            for extension in self.extensions
            if not kinds or any(key.kind in kinds for layer in layers for key, _ in self.asked(extension, layer))
        ]

    @cached_property
    def names(self) -> list[str]:
        return [extension.name for extension in self.extensions]

    @cached_property
    def differentiable(self) -> bool:
        """Whether a field can be differentiated."""
        return any(extension.differentiable for extension in self.extensions)


#: Kinds of columns that start at an extended loss.
CURVATURE = ("exact", "mc", "residual", "diagonal", "averaged")
#: Those that arise only below a layer that is curved itself.
RESIDUALS = ("residual", "diagonal")
#: Kinds that need second derivatives of whatever they pass: a node without definition must be linear.
SECOND_ORDER = (*RESIDUALS, "averaged")
