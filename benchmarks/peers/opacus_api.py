"""Opacus: hooks that compute individual gradients, and ghost norms where nothing but norms is asked for."""

from __future__ import annotations

from typing import Any

from problems import Task

from . import Compute, Results, take
from .individual import FIRST_ORDER, reductions

DISTRIBUTION = "opacus"
FEATURES = FIRST_ORDER
VARIANT = ""


def build(task: Task, features: tuple[str, ...]) -> Compute:
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    ghost = features == ("BatchL2Grad",)
    # "sum" leaves a gradient as it comes from the loss, 1/N included.
    wrap: Any = GradSampleModuleFastGradientClipping if ghost else GradSampleModule
    model = wrap(task.model, loss_reduction="sum")
    parameters: list[Any] = list(task.model.parameters())

    def compute() -> Results:
        task.loss(model(task.x), task.y).backward()
        if ghost:
            return {"BatchL2Grad": [take(parameter, "_norm_sample").square() for parameter in parameters]}
        gradients = [parameter.grad_sample for parameter in parameters]
        for parameter in parameters:
            parameter.grad_sample = None
        return reductions(gradients, features)

    return compute
