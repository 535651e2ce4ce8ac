"""backpack-for-pytorch."""

from __future__ import annotations

from problems import Task

from . import Compute, extension_api

DISTRIBUTION = "backpack-for-pytorch"
FEATURES = frozenset(extension_api.FIELDS)
VARIANT = ""


def build(task: Task, features: tuple[str, ...]) -> Compute:
    return extension_api.build("backpack", task, features)
