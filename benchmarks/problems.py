"""What is measured: the problems of the BackPACK paper (Dangel et al. 2020, after DeepOBS) and two newer ones, on random data.

Plain torch.nn. Dropout is left out: it would make the implementations compute on different networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Task(NamedTuple):
    """A network, its loss and one batch."""

    model: nn.Module
    loss: nn.Module
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Network:
    """`shape` of one sample. `exact_batch`: the batch of features whose cost grows with classes, where memory bounds it.

    `cells`: the features that the network is there for; empty: all.
    """

    what: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int = 10
    batch: int = 128
    exact_batch: int | None = None
    cells: tuple[str, ...] = ()

    def task(self, exact: bool = False, batch: int | None = None) -> Task:
        """The same numbers in every process."""
        n = batch or (exact and self.exact_batch) or self.batch
        torch.manual_seed(0)
        model = self.build()
        return Task(model, nn.CrossEntropyLoss(), torch.randn(n, *self.shape), torch.randint(self.classes, (n,)))


def logreg() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 10))


def mlp(*activations: type[nn.Module]) -> nn.Module:
    first, second = activations
    return nn.Sequential(nn.Linear(784, 512), first(), nn.Linear(512, 256), second(), nn.Linear(256, 10))


def cnn_2c2d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 1024), nn.ReLU(), nn.Linear(1024, 10)),
    )


def cnn_3c3d(last: type[nn.Module] = nn.ReLU) -> nn.Module:
    """DeepOBS pads its pooling at the right and bottom (28 → 14, 12 → 6, 6 → 3), which is torch's `ceil_mode`."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(64, 96, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), last(), nn.Linear(256, 10)),
    )


def allcnnc() -> nn.Module:
    """Nine convolutions (Springenberg et al. 2015): channels in, out, kernel, stride, padding."""
    plan = [(3, 96, 3, 1, 1), (96, 96, 3, 1, 1), (96, 96, 3, 2, 1), (96, 192, 3, 1, 1), (192, 192, 3, 1, 1)]
    plan += [(192, 192, 3, 2, 1), (192, 192, 3, 1, 0), (192, 192, 1, 1, 0), (192, 100, 1, 1, 0)]
    layers = [module for shape in plan for module in (nn.Conv2d(*shape), nn.ReLU())]
    return nn.Sequential(*layers, nn.AvgPool2d(6), nn.Flatten())


class Attention(nn.Module):
    """Softmax attention of `heads` heads in plain operations."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project_in, self.project_out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project_in(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return self.project_out((weights @ v).transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """x + branch(x)"""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Mean(nn.Module):
    """Over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def transformer(width: int = 64, heads: int = 4, blocks: int = 2) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(32, width)]
    for _ in range(blocks):
        layers.append(Residual(nn.LayerNorm(width), Attention(width, heads)))
        wide = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        layers.append(Residual(nn.LayerNorm(width), *wide))
    return nn.Sequential(*layers, nn.LayerNorm(width), Mean(), nn.Linear(width, 10))


def resnet(width: int = 32, blocks: int = 3) -> nn.Module:
    """Basic blocks with group norm: batch norm has no individual gradients."""

    def normed(inputs: int) -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.GroupNorm(8, width)

    stack: list[nn.Module] = [*normed(3), nn.ReLU()]
    for _ in range(blocks):
        stack += [Residual(*normed(width), nn.ReLU(), *normed(width)), nn.ReLU()]
    return nn.Sequential(*stack, nn.AvgPool2d(16), nn.Flatten(), nn.Linear(width, 10))


HESSIAN = ("DiagHessian",)
NETWORKS: dict[str, Network] = {
    "logreg": Network("784-10", logreg, (784,)),
    "mlp": Network("784-512-256-10, ReLU", lambda: mlp(nn.ReLU, nn.ReLU), (784,)),
    "2c2d": Network("Fashion-MNIST shapes", cnn_2c2d, (1, 28, 28)),
    "3c3d": Network("CIFAR-10 shapes", cnn_3c3d, (3, 32, 32)),
    "allcnnc": Network("CIFAR-100 shapes", allcnnc, (3, 32, 32), classes=100, batch=32, exact_batch=4),
    "transformer": Network("pre-norm, 2 blocks of width 64, 16 tokens", transformer, (16, 32), batch=32),
    "resnet": Network("3 blocks of width 32, group norm", resnet, (3, 16, 16), batch=32, exact_batch=8),
    "mlp-sigmoid": Network("mlp, last activation a sigmoid", lambda: mlp(nn.ReLU, nn.Sigmoid), (784,), cells=HESSIAN),
    "mlp-sigmoids": Network("mlp, sigmoids only", lambda: mlp(nn.Sigmoid, nn.Sigmoid), (784,), cells=HESSIAN),
    "3c3d-sigmoid": Network(
        "3c3d, last activation a sigmoid", lambda: cnn_3c3d(nn.Sigmoid), (3, 32, 32), cells=HESSIAN
    ),
}
