"""Quantities for some samples of a batch: their tensors are taken out first, so that nothing is computed for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from .quantities import quantities
from .rules import Need
from .uses import Use


def quantities_of(
    uses: Sequence[Use], needs: tuple[Need, ...], *signs: Tensor, differentiable: bool = False
) -> dict[Need, Tensor]:
    """What is needed of one parameter, from columns [V, *output] and their signs [V, N]."""
    found: dict[Need, Tensor] = {}
    for samples, asked in _by_samples(needs):
        first = all(use.record.batch.outer == 1 for use in uses)
        chosen = [restricted(use, samples) for use in uses] if samples is not None and first else uses
        weights = signs if chosen is uses or samples is None else [sign[:, list(samples)] for sign in signs]
        values = quantities(chosen, asked, *weights, differentiable=differentiable)
        if samples is not None and not first:  # only individual columns are asked for of some samples
            values = {name: value[:, list(samples)] for name, value in values.items()}
        found |= {asked[name]: value for name, value in values.items()}
    return found


@lru_cache
def _by_samples(needs: tuple[Need, ...]) -> list[tuple[tuple[int, ...] | None, dict[str, Need]]]:
    """The needs by the samples that they are of, and by quantity."""
    found: dict[tuple[int, ...] | None, dict[str, Need]] = {}
    for need in needs:
        found.setdefault(need.samples, {})[need.quantity] = need
    return list(found.items())


def restricted(use: Use, samples: Sequence[int]) -> Use:
    """The same use on a batch of the listed samples."""
    record, index = use.record, list(samples)
    part = replace(
        record,
        tensors={},
        versions=dict(record.versions),
        input_shape=(len(index), *record.input_shape[1:]),
        output_shape=(len(index), *record.output_shape[1:]),
    )
    chosen = ("input", "output")
    part.keep(
        **{name: record.tensor(name)[index] if name in chosen else record.tensor(name) for name in record.tensors}
    )
    return Use(part, use.name, None if use.factor is None else use.factor[:, index])
