"""curvlinops: KFAC after Eschenhagen et al. (2023). It makes a forward and backward of its own beside the gradient's."""

from __future__ import annotations

import torch

from problems import Task

from . import Compute, Results

DISTRIBUTION = "curvlinops-for-pytorch"
FEATURES = frozenset({"KFAC", "KFLR"})
VARIANT = "expand"
FISHER = {"KFAC": "mc", "KFLR": "type-2"}


def build(task: Task, features: tuple[str, ...]) -> Compute:
    from curvlinops import KFACLinearOperator

    names = [name.rpartition(".") for name, _ in task.model.named_parameters()]
    parameters = list(task.model.parameters())

    def compute() -> Results:
        task.loss(task.model(task.x), task.y).backward()
        found: Results = {}
        for feature in features:
            operator = KFACLinearOperator(
                task.model,
                task.loss,
                parameters,
                [(task.x, task.y)],
                check_deterministic=False,
                seed=int(torch.randint(2**31, ())),
                fisher_type=FISHER[feature],
                kfac_approx=VARIANT,
                num_per_example_loss_terms=1,
                num_data=len(task.x),
            )
            operator.compute_kronecker_factors()
            inputs, outputs = operator._input_covariances, operator._gradient_covariances
            found[feature] = [
                [outputs[module], inputs[module]] if kind == "weight" else [outputs[module]]
                for module, _, kind in names
            ]
        return found

    return compute
