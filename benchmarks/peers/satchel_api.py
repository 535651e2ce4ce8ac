"""satchel: this package."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cells import NOTHING
from problems import Task
from satchel.runtime.extension import Extension
from satchel.runtime.rules import Layer, Need, Sizes

from . import Compute, extension_api

DISTRIBUTION = "satchel"
FEATURES = frozenset({*extension_api.FIELDS, NOTHING})
VARIANT = ""


class Nothing(Extension):
    """Asks for no quantity, and leaves an empty field."""

    field = NOTHING

    def needs(self, layer: Layer) -> tuple[Need, ...]:
        return ()

    def value(self, q: Mapping[str, Tensor], sizes: Sizes) -> Tensor | list[Tensor]:
        return []


def build(task: Task, features: tuple[str, ...], variant: str = VARIANT) -> Compute:
    if features == (NOTHING,):
        return extension_api.computed("satchel", task, lambda: [Nothing()], {NOTHING: NOTHING})
    return extension_api.build("satchel", task, features, **({"approximation": variant} if variant else {}))
