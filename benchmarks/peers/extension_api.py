"""Packages with BackPACK's interface: extend, backpack and .extensions."""

from __future__ import annotations

from importlib import import_module

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
    library, extensions = import_module(package), import_module(f"{package}.extensions")
    model, loss = library.extend(task.model), library.extend(task.loss)
    parameters = list(model.parameters())

    def compute() -> Results:
        asked = [getattr(extensions, name)(**(options if name in ("KFAC", "KFLR") else {})) for name in features]
        with library.backpack(*asked):
            loss(model(task.x), task.y).backward()
        return {name: [take(parameter, FIELDS[name]) for parameter in parameters] for name in features}

    return compute
