"""Which quantities the active features need of a layer, by the columns that they are computed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .extension import Extension
from .rules import Layer, Need


@dataclass(frozen=True)
class Source:
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
        self._by_layer: dict[str, Mapping[Source, tuple[Need, ...]]] = {}

    def of(self, layer: Layer) -> Mapping[Source, tuple[Need, ...]]:
        """Needs by source, each once."""
        if layer.name not in self._by_layer:
            found: dict[Source, dict[Need, None]] = {}
            for extension in self.extensions:
                for need in extension.needs(layer):
                    found.setdefault(source(extension, need), {})[need] = None
            self._by_layer[layer.name] = {key: tuple(needs) for key, needs in found.items()}
        return self._by_layer[layer.name]

    def needs(self, layers: Iterable[Layer], source: Source) -> list[Need]:
        return list(dict.fromkeys(need for layer in layers for need in self.of(layer).get(source, ())))

    def sources(self, layers: Iterable[Layer]) -> list[Source]:
        return list(dict.fromkeys(source for layer in layers for source in self.of(layer)))

    def features(self, layers: Iterable[Layer], *kinds: str) -> list[str]:
        """Names of the features that need columns of one of `kinds` (of any kind, if none is given)."""
        layers = list(layers)
        return [
            extension.name
            for extension in self.extensions
            if not kinds or any(need.source in kinds for layer in layers for need in extension.needs(layer))
        ]

    @cached_property
    def names(self) -> list[str]:
        return [extension.name for extension in self.extensions]


#: Kinds of columns that start at an extended loss.
CURVATURE = ("exact", "mc", "residual", "diagonal", "averaged")
#: Those that arise only below a layer that is curved itself.
RESIDUALS = ("residual", "diagonal")
#: Kinds that need second derivatives of whatever they pass: a node without definition must be linear.
SECOND_ORDER = (*RESIDUALS, "averaged")
