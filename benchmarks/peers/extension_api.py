"""Packages with BackPACK's interface: extend, backpack and .extensions."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from problems import Task

from . import Compute, Results, Unsupported

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
    library, extensions = import_module(package), import_module(f"{package}.extensions")
    model, loss = library.extend(task.model), library.extend(task.loss)
    parameters = list(model.parameters())

    def compute() -> Results:
        asked = [getattr(extensions, name)(**(options if name in ("KFAC", "KFLR") else {})) for name in features]
        with library.backpack(*asked):
            loss(model(task.x), task.y).backward()
        return {name: [_taken(parameter, FIELDS[name]) for parameter in parameters] for name in features}

    return compute


def _taken(parameter: nn.Parameter, field: str) -> Any:
    if field not in vars(parameter):
        raise Unsupported(f"leaves no {field} on a parameter [{', '.join(map(str, parameter.shape))}]")
    return vars(parameter).pop(field)
