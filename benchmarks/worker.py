"""Times one implementation in its own process and interpreter; needs torch and that implementation, nothing else.

Speaks JSON lines: {"network", "feature", "steps"} in, {"plain", "feature"} seconds per step out. Driven by overhead.py.

To add a network, write a function under NETWORKS; to add an implementation, one under IMPLEMENTATIONS.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# Before torch loads: idle OpenMP threads must not spin on the cores that the other process measures on.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import Tensor, nn

Step = Callable[[], None]


class Task(NamedTuple):
    """A network, its loss and one batch."""

    model: nn.Module
    loss: nn.Module
    x: Tensor
    y: Tensor


def mlp() -> Task:
    """784-512-256-10 with ReLU, cross-entropy, batch 128: issue 2's network."""
    layers = (nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
    return Task(nn.Sequential(*layers), nn.CrossEntropyLoss(), torch.randn(128, 784), torch.randint(10, (128,)))


NETWORKS: dict[str, Callable[[], Task]] = {"mlp": mlp}

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
FEATURES: dict[str, tuple[str, ...]] = {**{name: (name,) for name in FIELDS}, "all ten": tuple(FIELDS)}


def plain(task: Task) -> Step:
    """Forward and backward of an ordinary model: what every ratio divides by."""
    parameters = list(task.model.parameters())

    def step() -> None:
        task.loss(task.model(task.x), task.y).backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def backpack_api(package: str) -> Callable[[Task, tuple[str, ...]], Step]:
    """`package` offers extend, backpack and .extensions: BackPACK, and satchel, which keeps its API."""

    def build(task: Task, features: tuple[str, ...]) -> Step:
        library = importlib.import_module(package)
        extensions = importlib.import_module(f"{package}.extensions")
        model, loss = library.extend(task.model), library.extend(task.loss)
        parameters = list(model.parameters())

        def step() -> None:
            with library.backpack(*(getattr(extensions, name)() for name in features)):
                loss(model(task.x), task.y).backward()
            for parameter in parameters:
                parameter.grad = None
                for name in features:
                    delattr(parameter, FIELDS[name])

        return step

    return build


class Implementation(NamedTuple):
    """Its distribution, for the version, and how it builds a step that computes features and frees them."""

    distribution: str
    build: Callable[[Task, tuple[str, ...]], Step]


IMPLEMENTATIONS = {
    "satchel": Implementation("satchel", backpack_api("satchel")),
    "backpack": Implementation("backpack-for-pytorch", backpack_api("backpack")),
}


def seconds(step: Step, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def environment(name: str) -> dict[str, Any]:
    return {
        "version": importlib.metadata.version(IMPLEMENTATIONS[name].distribution),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def serve(name: str, threads: int) -> None:
    """Answer requests until the input ends. Networks are built once, the plain one apart from the extended one."""
    torch.set_num_threads(threads)
    print(json.dumps(environment(name)), flush=True)
    built: dict[tuple[str, str], tuple[Step, Step]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        network, feature = request["network"], request["feature"]
        if (network, feature) not in built:
            torch.manual_seed(0)
            pair = plain(NETWORKS[network]()), IMPLEMENTATIONS[name].build(NETWORKS[network](), FEATURES[feature])
            for step in pair:
                seconds(step, 2)
            built[network, feature] = pair
        base, extended = built[network, feature]
        times = {"plain": seconds(base, request["steps"]), "feature": seconds(extended, request["steps"])}
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
