"""satchel: this package."""

from __future__ import annotations

from problems import Task

from . import Compute, extension_api

DISTRIBUTION = "satchel"
FEATURES = frozenset(extension_api.FIELDS)
VARIANT = ""


def build(task: Task, features: tuple[str, ...], variant: str = VARIANT) -> Compute:
    return extension_api.build("satchel", task, features, **({"approximation": variant} if variant else {}))
