"""satchel: this package."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cells import NOTHING
from problems import Task
from satchel import backpack, extend
from satchel.runtime.extension import Extension
from satchel.runtime.rules import Layer, Need, Sizes

from . import Compute, Results, extension_api, take

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
        return _nothing(task)
    return extension_api.build("satchel", task, features, **({"approximation": variant} if variant else {}))


def _nothing(task: Task) -> Compute:
    model, loss = extend(task.model), extend(task.loss)
    parameters = list(model.parameters())

    def compute() -> Results:
        with backpack(Nothing()):
            loss(model(task.x), task.y).backward()
        return {NOTHING: [take(parameter, NOTHING) for parameter in parameters]}

    return compute
