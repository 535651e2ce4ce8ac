"""Quantities for some samples of a batch: of canonical tensors, whose first axis they are, so that nothing is computed for the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

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
    chosen = [_Restricted(use, samples) for use in uses]
    return quantities(chosen, names, *(sign[:, samples] for sign in signs), differentiable=differentiable)


@lru_cache
def _by_samples(needs: tuple[Need, ...]) -> list[tuple[tuple[int, ...] | None, dict[str, Need]]]:
    """The needs by the samples that they are of, and by quantity."""
    found: dict[tuple[int, ...] | None, dict[str, Need]] = {}
    for need in needs:
        found.setdefault(need.samples, {})[need.quantity] = need
    return list(found.items())


class _Restricted(Use):
    """The same use, its operands those of the listed samples; the record is still the whole batch's."""

    def __init__(self, use: Use, samples: list[int]) -> None:
        super().__init__(use.record, use.name, None if use.factor is None else use.factor[:, samples])
        self.samples = samples

    def _operand(self, name: str) -> Any:
        found = super()._operand(name)
        if name in ("input", "output"):
            return found[self.samples]
        return (len(self.samples), *found[1:]) if name in ("input_shape", "output_shape") else found
