"""Quantities for some samples of a batch: their tensors are taken out first, so that nothing is computed for the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        if samples is None:
            values = quantities(uses, asked, *signs, differentiable=differentiable)
        else:
            values = _of_samples(uses, list(samples), asked, signs, differentiable)
        for name, value in values.items():
            found[asked[name]] = value
    return found


def _of_samples(
    uses: Sequence[Use], samples: list[int], names: Iterable[str], signs: Sequence[Tensor], differentiable: bool
) -> dict[str, Tensor]:
    """The quantities `names` of the listed samples."""
    if all(use.record.batch.outer == 1 for use in uses):
        chosen = [restricted(use, samples) for use in uses]
        return quantities(chosen, names, *(sign[:, samples] for sign in signs), differentiable=differentiable)
    found = quantities(uses, names, *signs, differentiable=differentiable)
    return {name: value[:, samples] for name, value in found.items()}  # only individual columns are asked for of some


@lru_cache
def _by_samples(needs: tuple[Need, ...]) -> list[tuple[tuple[int, ...] | None, dict[str, Need]]]:
    """The needs by the samples that they are of, and by quantity."""
    found: dict[tuple[int, ...] | None, dict[str, Need]] = {}
    for need in needs:
        found.setdefault(need.samples, {})[need.quantity] = need
    return list(found.items())


def restricted(use: Use, index: list[int]) -> Use:
    """The same use on a batch of the listed samples."""
    record = use.record
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
