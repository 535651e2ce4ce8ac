"""Which features a definition supports, read off the rules that were derived for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..definitions import Definitions, Feature, NoDistribution
from .kernels import layer_kernels, loss_kernels
from .losses import lower_loss
from .rules import LoweredLayer, lower_layer


@dataclass(frozen=True)
class Row:
    """One definition: its kind, its features (None: supported, else the reason why not), and the rules with a Triton kernel."""

    name: str
    kind: str
    features: Mapping[str, str | None]
    kernels: int
    rules: int


def support(definitions: Definitions) -> list[Row]:
    """The support table, definitions × features."""
    rows = []
    for layer in definitions.layers:
        lowered = lower_layer(layer)
        missing = {f.name: _missing(lowered, f) for f in definitions.features}
        rows.append(Row(layer.name, "layer", missing, len(layer_kernels(lowered)), len(lowered.rules)))
    supported = dict.fromkeys([f.name for f in definitions.features])
    rows += [Row(d.name, "layer", supported, 0, 0) for d in definitions.passing]
    for loss in definitions.losses:
        derived = lower_loss(loss)
        reason = loss.distribution.reason if isinstance(loss.distribution, NoDistribution) else None
        features = {f.name: reason if "mc" in f.needs else None for f in definitions.features}
        rows.append(Row(loss.name, "loss", features, len(loss_kernels(derived)), len(derived.rules)))
    return rows


def _missing(layer: LoweredLayer, feature: Feature) -> str | None:
    """All that passes a layer is composed from Jᵀv, where no rule says it in one; integers have none and need none."""
    passes = set(feature.needs) - {"gradient", "input"}
    if passes and layer.passes["vjp"] is None and not layer.layer.of_integers:
        return "its input cannot be differentiated"
    return None
