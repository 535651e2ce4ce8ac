"""asdfghjkl (ASDL): Fisher matrices as diagonals and Kronecker factors; weight and bias have one input factor together.

SumGradSquared is its empirical Fisher's diagonal. Other than that of the labels, a Fisher takes a second backward per label.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from problems import Task

from . import Compute, Results, Unsupported, take

DISTRIBUTION = "asdfghjkl"
FISHER = {
    "SumGradSquared": ("fisher_emp", "diag"),
    "DiagGGNExact": ("fisher_exact", "diag"),
    "DiagGGNMC": ("fisher_mc", "diag"),
    "KFLR": ("fisher_exact", "kron"),
    "KFAC": ("fisher_mc", "kron"),
}
FEATURES = frozenset({"BatchGrad", *FISHER})
VARIANT = "expand"


def build(task: Task, features: tuple[str, ...]) -> Compute:
    import asdl

    model, n = task.model, len(task.x)
    modules = dict(model.named_modules())
    places = [(modules[path], kind) for path, _, kind in (name.rpartition(".") for name, _ in model.named_parameters())]
    # One pass for each type of Fisher: its shapes share it.
    types: dict[str, list[str]] = {}
    for feature in features:
        if feature in FISHER:
            types.setdefault(FISHER[feature][0], []).append(feature)

    def fisher(kind: str, last: bool) -> None:
        scale = 1 / n if kind == "fisher_emp" else 1.0
        shapes = [FISHER[feature][1] for feature in types[kind]]
        maker = asdl.get_fisher_maker(
            model, asdl.FisherConfig(kind, shapes, loss_type="cross_entropy", data_size=n, scale=scale)
        )
        logits = maker.setup_model_call(model, task.x)
        maker.setup_loss_call(F.cross_entropy, logits, task.y, reduction="sum")
        maker.forward_and_backward(calc_loss_grad=last)

    def compute() -> Results:
        found: Results = {}
        if "BatchGrad" in features:
            asdl.save_batch_gradient(model, lambda: task.loss(model(task.x), task.y).backward())
            found["BatchGrad"] = [take(parameter, "batch_grad") for parameter in model.parameters()]
        for kind, wanted in types.items():
            fisher(kind, last="BatchGrad" not in features and kind == next(reversed(types)))
            for feature in wanted:
                found[feature] = [_taken(module, name, FISHER[feature][1]) for module, name in places]
            for module in modules.values():
                if hasattr(module, "fisher"):
                    del module.fisher
        return found

    return compute


def _taken(module: Any, name: str, shape: str) -> Any:
    matrix = getattr(module, "fisher", None)
    if matrix is None:
        raise Unsupported(f"leaves no Fisher matrix on a {type(module).__name__}")
    if shape == "diag":
        return getattr(matrix.diag, name)
    if name == "bias":
        return [matrix.kron.B]
    inputs = module.weight[0].numel()
    return [matrix.kron.B, matrix.kron.A[:inputs, :inputs]]
