"""torch.func: vmap of grad. Curvature of the cross-entropy is made of gradients for labels drawn, or for each class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from problems import Task

from . import Compute, Results
from .individual import FIRST_ORDER, reductions

DISTRIBUTION = "torch"
FEATURES = FIRST_ORDER | {"DiagGGNMC", "DiagGGNExact"}
VARIANT = ""


def build(task: Task, features: tuple[str, ...]) -> Compute:
    model, n = task.model, len(task.x)
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        output = functional_call(model, values, (x[None],))
        return weight * task.loss(output, y[None]), output[0]

    individual = vmap(grad(loss, has_aux=True), in_dims=(None, 0, 0, 0))

    def squares(y: Tensor, weight: Tensor) -> list[Tensor]:
        return [g.square().sum(0) for g in individual(detached, task.x, y, weight)[0].values()]

    detached = {name: parameter.detach() for name, parameter in parameters.items()}

    def compute() -> Results:
        gradients, output = individual(detached, task.x, task.y, torch.full((n,), 1 / n))
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].sum(0)
        found = reductions(list(gradients.values()), features)
        probability = output.softmax(1)
        if "DiagGGNMC" in features:
            found["DiagGGNMC"] = squares(probability.multinomial(1)[:, 0], torch.full((n,), n**-0.5))
        if "DiagGGNExact" in features:
            classes = range(output.shape[1])
            parts = [squares(torch.full((n,), c), (probability[:, c] / n).sqrt()) for c in classes]
            found["DiagGGNExact"] = [torch.stack(part).sum(0) for part in zip(*parts, strict=True)]
        return found

    return compute
