"""Train on handwritten digits with KFAC, SGD and Adam, and look at all ten features of one batch.

python examples/digits.py [--out digits.png] [--epochs 10] [--seed 0] [--quick]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from digits_checks import exact_fields
from digits_figure import draw
from kfac_optimizer import KFACOptimizer
from satchel import backpack, extend
from satchel.extensions import (
    KFAC,
    KFLR,
    KFRA,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SumGradSquared,
    Variance,
)

FEATURES = {
    "grad_batch": BatchGrad(),
    "batch_l2": BatchL2Grad(),
    "sum_grad_squared": SumGradSquared(),
    "variance": Variance(),
    "diag_ggn_exact": DiagGGNExact(),
    "diag_ggn_mc": DiagGGNMC(mc_samples=1000),
    "diag_h": DiagHessian(),
    "kfac": KFAC(mc_samples=1000),
    "kflr": KFLR(),
    "kfra": KFRA(),
}
SAMPLED = {"diag_ggn_mc": "diag_ggn_exact", "kfac": "kflr"}  # a Monte-Carlo estimate and what it estimates

# All have momentum 0.9 (Adam: its first moment) and their usual settings; each is tuned over the same learning rates.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "KFAC": lambda parameters, lr: KFACOptimizer(parameters, lr=lr),
    "Adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
TUNING_SEED_OFFSET = 1000  # the seeds that are shown are not the one that chose the learning rates
TARGETS = (0.1, 0.01)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Split(NamedTuple):
    """Centred images [N, 64] and their digits [N]."""

    x: Tensor
    y: Tensor


class Data(NamedTuple):
    train: Split
    test: Split


@dataclass
class Run:
    """One training run: the loss on the whole training set before each step and after the last."""

    lr: float
    losses: list[float] = field(default_factory=list)
    signal_to_noise: list[list[float]] = field(default_factory=list)  # per step and weight matrix
    accuracy: float = math.nan
    milliseconds: float = math.nan  # per step, evaluation not included

    @property
    def score(self) -> float:
        """The mean of log(loss) over the run: low early and low at the end both count."""
        return mean(math.log(loss) for loss in self.losses) if math.isfinite(self.losses[-1]) else math.inf

    def steps_to(self, target: float) -> int | None:
        return next((step for step, loss in enumerate(self.losses) if loss <= target), None)


def load() -> Data:
    """1,437 images to train on and 360 to test with."""
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digits)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order] - x.mean(), y[order]
    return Data(Split(x[:1437], y[:1437]), Split(x[1437:], y[1437:]))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def batches(data: Split, epochs: int, size: int = 128) -> Iterator[Split]:
    """Full batches in a new random order each epoch; the incomplete last one is dropped."""
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.x)).split(size)[:-1]:
            yield Split(data.x[chosen], data.y[chosen])


def train(name: str, lr: float, data: Data, epochs: int, seed: int, measure: bool = False) -> Run:
    """The seed gives all optimizers the same initial weights and the same batches."""
    torch.manual_seed(seed)
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    optimizer = OPTIMIZERS[name](list(model.parameters()), lr)
    run, spent = Run(lr), 0.0
    for batch in list(batches(data.train, epochs)):
        run.losses.append(evaluate(model, loss_fn, data.train))
        if not math.isfinite(run.losses[-1]):
            return run
        if measure:
            run.signal_to_noise.append(signal_to_noise(model, loss_fn, data.train))
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_fn(model(batch.x), batch.y)
        if name == "KFAC":
            with backpack(KFAC(mc_samples=1)):
                loss.backward()
        else:
            loss.backward()
        optimizer.step()
        spent += time.perf_counter() - start
    run.milliseconds = 1000 * spent / len(run.losses)
    run.losses.append(evaluate(model, loss_fn, data.train))
    with torch.no_grad():
        run.accuracy = (model(data.test.x).argmax(1) == data.test.y).float().mean().item()
    return run


@torch.no_grad()
def evaluate(model: nn.Module, loss_fn: nn.Module, data: Split) -> float:
    return float(loss_fn(model(data.x), data.y))


def weights(model: nn.Module) -> dict[str, Any]:
    """The weight matrices. Any: a type checker cannot know the fields that a backward pass leaves."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}


def signal_to_noise(model: nn.Module, loss_fn: nn.Module, data: Split) -> list[float]:
    """‖mean_n g_n‖² / Σ var_n g_n for each weight matrix. `variance` is that of g_n / N: both are scaled by 1/N²."""
    model.zero_grad()
    with backpack(Variance()):
        loss_fn(model(data.x), data.y).backward()
    return [float((p.grad / len(data.x)).square().sum() / p.variance.sum()) for p in weights(model).values()]


def curvature(seed: int, data: Split) -> dict[str, Tensor]:
    """The Gauss-Newton diagonal of each weight matrix at initialisation."""
    torch.manual_seed(seed)
    model, loss_fn = extend(mlp()), extend(nn.CrossEntropyLoss())
    with backpack(DiagGGNExact()):
        loss_fn(model(data.x), data.y).backward()
    return {name: p.diag_ggn_exact.flatten() for name, p in weights(model).items()}


def tune(data: Data, epochs: int, seed: int, tick: Callable[[], None]) -> dict[str, float]:
    """The learning rate of each optimizer's best run."""
    best = {}
    for name in OPTIMIZERS:
        runs = []
        for lr in LEARNING_RATES:
            runs.append(train(name, lr, data, epochs, seed))
            tick()
        best[name] = min(runs, key=lambda run: run.score).lr
    return best


def race_table(runs: dict[str, list[Run]]) -> Table:
    """Means over the seeds; a dash where a seed did not get there."""
    table = Table(title="Training on digits", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in ("rate", *(f"steps to {target:g}" for target in TARGETS), "loss", "accuracy", "ms/step"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, repeats in runs.items():
        reached = []
        for target in TARGETS:
            steps = [step for run in repeats if (step := run.steps_to(target)) is not None]
            reached.append(f"{mean(steps):.0f}" if len(steps) == len(repeats) else "–")
        table.add_row(
            name,
            f"{repeats[0].lr:g}",
            *reached,
            f"{mean(run.losses[-1] for run in repeats):.2g}",
            f"{mean(run.accuracy for run in repeats):.1%}",
            f"{mean(run.milliseconds for run in repeats):.1f}",
        )
    return table


def feature_table(data: Split, seed: int, samples: int = 32) -> tuple[Table, bool]:
    """All ten features of one batch in float64, from one backward pass, and whether they agree with plain autograd."""
    torch.manual_seed(seed)
    plain, x, y = mlp().double(), data.x[:samples].double(), data.y[:samples]
    expected = exact_fields(plain, nn.CrossEntropyLoss(), x, y)
    model, loss_fn = extend(plain), extend(nn.CrossEntropyLoss())
    with backpack(*FEATURES.values()):
        loss_fn(model(x), y).backward()

    table = Table(title=f"All ten features of one batch of {samples}", box=box.SIMPLE_HEAD)
    for column in ("feature", "parameter", "shape"):
        table.add_column(column, no_wrap=True)
    for column in ("norm", "checked"):
        table.add_column(column, justify="right", no_wrap=True)
    agree = True
    parameters = dict(model.named_parameters())
    for name, feature in FEATURES.items():
        titles = iter((type(feature).__name__, f"[dim].{name}[/]"))
        for index, (parameter, tensor) in enumerate(parameters.items()):
            found = getattr(tensor, name)
            found = found if isinstance(found, list) else [found]
            error = relative_error(found, expected[SAMPLED.get(name, name)][index])
            agree &= name in SAMPLED or error < 1e-10
            table.add_row(
                next(titles, ""),
                parameter,
                ", ".join("×".join(map(str, part.shape)) for part in found),
                ", ".join(f"{float(part.norm()):.2g}" for part in found),
                f"≈ {error:.1%}" if name in SAMPLED else f"{error:.0e} {'✓' if error < 1e-10 else '✗'}",
                end_section=index == len(parameters) - 1,
            )
    return table, agree


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Where to write the figure.")] = Path("digits.png"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 10,
    seed: Annotated[int, typer.Option(help="First of the three seeds shown.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Four epochs, one seed.")] = False,
) -> None:
    """Train on digits with KFAC, SGD and Adam, and look at all ten features."""
    torch.set_num_threads(1)  # the matrices are too small to share
    console = Console()
    data = load()
    seeds = range(seed, seed + 3)
    if quick:
        seeds, epochs = seeds[:1], min(epochs, 4)

    table, agree = feature_table(data.train, seed)
    console.print(table)
    console.print("checked: max |difference| / max |expected|, against loops of plain autograd;")
    console.print("≈ for 1,000 Monte-Carlo samples, against the exact counterpart.\n", highlight=False)
    if not agree:
        raise typer.Exit(1)

    columns = (TextColumn("{task.description:23}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        tuning = bar.add_task("choosing learning rates", total=len(OPTIMIZERS) * len(LEARNING_RATES))
        racing = bar.add_task("training", total=len(OPTIMIZERS) * len(seeds))
        rates = tune(data, epochs, seed + TUNING_SEED_OFFSET, lambda: bar.advance(tuning))
        runs: dict[str, list[Run]] = {name: [] for name in OPTIMIZERS}
        for name, lr in rates.items():
            for s in seeds:
                runs[name].append(train(name, lr, data, epochs, s, measure=name == "KFAC" and s == seed))
                bar.advance(racing)
    console.print(race_table(runs))
    console.print(f"Loss on the whole training set, mean over {len(seeds)} seed(s).", highlight=False)
    console.print(f"Rates chosen from {', '.join(map(str, LEARNING_RATES))},", highlight=False)
    console.print("on a seed of their own, by the mean of log(loss) over the run.\n")

    layers = list(weights(mlp()))
    draw(
        out,
        losses={name: [run.losses for run in repeats] for name, repeats in runs.items()},
        signal_to_noise=dict(zip(layers, zip(*runs["KFAC"][0].signal_to_noise, strict=True), strict=True)),
        curvature=curvature(seed, data.train),
    )
    console.print(f"Wrote {out}")


if __name__ == "__main__":
    app()
