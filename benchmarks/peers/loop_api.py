"""A loop over the samples with autograd, as one writes it without a library. Nothing but the asked results is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from problems import Task

from . import Compute, Results
from .individual import FIRST_ORDER

DISTRIBUTION = "torch"
FEATURES = FIRST_ORDER | {"DiagGGNMC", "DiagGGNExact"}
VARIANT = ""


def build(task: Task, features: tuple[str, ...]) -> Compute:
    model, n = task.model, len(task.x)
    parameters = list(model.parameters())
    labelled = [name for name in ("DiagGGNMC", "DiagGGNExact") if name in features]
    summed = [name for name in ("SumGradSquared", "DiagGGNMC", "DiagGGNExact") if name in features]

    def compute() -> Results:
        found: Results = {name: [torch.zeros_like(parameter) for parameter in parameters] for name in summed}
        for name in ("BatchGrad", "BatchL2Grad"):
            if name in features:
                found[name] = [
                    parameter.new_empty(n, *parameter.shape * (name == "BatchGrad")) for parameter in parameters
                ]
        mean = [torch.zeros_like(parameter) for parameter in parameters]
        deviations = [torch.zeros_like(parameter) for parameter in parameters] if "Variance" in features else []
        for i in range(n):
            output = model(task.x[i : i + 1])
            loss = task.loss(output, task.y[i : i + 1]) / n
            gradients = torch.autograd.grad(loss, parameters, retain_graph=bool(labelled))
            for k, gradient in enumerate(gradients):
                if "BatchGrad" in features:
                    found["BatchGrad"][k][i] = gradient
                if "BatchL2Grad" in features:
                    found["BatchL2Grad"][k][i] = gradient.square().sum()
                if "SumGradSquared" in features:
                    found["SumGradSquared"][k] += gradient.square()
                delta = gradient - mean[k]
                mean[k].add_(delta, alpha=1 / (i + 1))
                if deviations:  # Welford's update
                    deviations[k].addcmul_(delta, gradient - mean[k])
            for name in labelled:
                for y, weight in _labels(output, name):
                    scaled = task.loss(output, y) * (weight / n) ** 0.5
                    for k, gradient in enumerate(torch.autograd.grad(scaled, parameters, retain_graph=True)):
                        found[name][k] += gradient.square()
        for parameter, average in zip(parameters, mean, strict=True):
            parameter.grad = average * n
        if deviations:
            found["Variance"] = [total / n for total in deviations]
        return found

    return compute


def _labels(output: Tensor, feature: str) -> list[tuple[Tensor, Tensor]]:
    """Labels of one sample with the weights of their squared gradients."""
    probability = output.detach().softmax(1)
    if feature == "DiagGGNMC":
        return [(probability.multinomial(1)[0], torch.ones(()))]
    return [(torch.tensor([c]), probability[0, c]) for c in range(output.shape[1])]
