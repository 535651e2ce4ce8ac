"""Packages with BackPACK's interface: extend, backpack and .extensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from problems import Task

from . import Compute, Results, take

FIELDS = {
    "BatchGrad": "grad_batch",
    "BatchL2Grad": "batch_l2",
    "SumGradSquared": "sum_grad_squared",
    "Variance": "variance",
    "DiagGGNExact": "diag_ggn_exact",
    "DiagGGNMC": "diag_ggn_mc",
    "DiagHessian": "diag_h",
    "KFAC": "kfac",
    "KFLR": "kflr",
    "KFRA": "kfra",
}


def build(package: str, task: Task, features: tuple[str, ...], **options: str) -> Compute:
    """`options` of the Kronecker factors."""
    extensions = import_module(f"{package}.extensions")

    def asked() -> list[Any]:
        return [getattr(extensions, name)(**(options if name in ("KFAC", "KFLR") else {})) for name in features]

    return computed(package, task, asked, {name: FIELDS[name] for name in features})


def computed(package: str, task: Task, asked: Callable[[], list[Any]], fields: Mapping[str, str]) -> Compute:
    """`asked` makes the features of a pass, `fields` are what they leave."""
    library = import_module(package)
    model, loss = library.extend(task.model), library.extend(task.loss)
    parameters = list(model.parameters())

    def compute() -> Results:
        with library.backpack(*asked()):
            loss(model(task.x), task.y).backward()
        return {name: [take(parameter, field) for parameter in parameters] for name, field in fields.items()}

    return compute
