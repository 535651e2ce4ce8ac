"""What all tests share: which definitions, precisions and backends there are, one pass of the package, and one measure of agreement."""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from cases import Case, Revealed, around
from networks import NETWORKS

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
torch.set_num_threads(1)

import satchel  # noqa: E402
from satchel import backpack, extend, extensions  # noqa: E402
from satchel.runtime import cost, matmul, memory, quantities, symmetric  # noqa: E402
from satchel_gen.definitions import load  # noqa: E402

DEFINITIONS = load()
FEATURES = [getattr(extensions, definition.name) for definition in DEFINITIONS.features]


def module_class(definition: Any) -> Any:
    """The torch.nn class of a layer's, a passing module's or a loss's definition."""
    return getattr(nn, definition.module.rpartition(".")[2])


#: One loss for each structure of a Hessian; test_losses.py takes all of them.
LOSSES = [nn.CrossEntropyLoss, nn.MSELoss]
LAYERS = [
    around(f"{definition.name}_{k}", module_class(definition), example)
    for definition in (*DEFINITIONS.layers, *DEFINITIONS.passing)
    for k, example in enumerate(definition.examples)
]
#: Features that want the batch first: they carry second derivatives, or a matrix over all of a sample.
SECOND_ORDER = {d.name for d in DEFINITIONS.features if {"residual", "diagonal", "averaged"} & set(d.needs)}
#: What is zero but for rounding, next to the largest entry of all parameters.
NEGLIGIBLE = {torch.float64: 1e-9, torch.float32: 1e-6}
#: Relative to the largest entry of the reference.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

KERNELS = ["triton", *(["gpu"] if GPU else [])]

CHOICES: dict[str, Sequence[Any]] = {
    "network": NETWORKS,
    "layer": LAYERS,
    "loss": LOSSES,
    "reduction": ["mean", "sum"],
    "dtype": [torch.float64, torch.float32],
    "backend": ["aten", *KERNELS],
    "feature": FEATURES,
}


def label(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else getattr(value, "name", str(value).removeprefix("torch."))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """An argument named like a choice takes all its values, unless the test says which."""
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    said = {name for names in given for name in (names.split(",") if isinstance(names, str) else names)}
    for name, values in CHOICES.items():
        if name in metafunc.fixturenames and name not in said:
            metafunc.parametrize(name, values, ids=[label(value) for value in values])


def as_if_large(monkeypatch: pytest.MonkeyPatch, cache_elements: int) -> None:
    """Fields and products of any size are written into the memory of the pass before, and by blocks that fit into so small a cache."""
    monkeypatch.setattr(cost, "machine", replace(cost.machine, cache_elements=cache_elements))
    monkeypatch.setattr(memory, "KEPT", 0)
    monkeypatch.setattr(quantities, "FRESH", 0)
    for limit in ("_LARGE", "_APART"):
        monkeypatch.setattr(matmul, limit, 0)
    monkeypatch.setattr(symmetric, "_STRIP", 1)


def is_sampled(feature: type) -> bool:
    return "mc_samples" in inspect.signature(feature).parameters


EXACT = [feature for feature in FEATURES if not is_sampled(feature)]
SAMPLED = [feature for feature in FEATURES if is_sampled(feature)]


class Pass:
    """One forward and backward of an extended model with some features."""

    def __init__(
        self, case: Case, dtype: torch.dtype, backend: str, *features: Any, reveal: bool = False, **options: Any
    ):
        device = "cuda" if backend == "gpu" else "cpu"
        network = case.network.model()
        target = case.target()
        model: nn.Module = Revealed(network, case.network.input()) if reveal else network
        self.model: Any = extend(model.to(device, dtype))
        self.network: Any = network
        self.loss = extend(case.criterion().to(device, dtype))
        self.features = features
        x = case.network.input().to(device)  # keeps the strides
        x = x.to(dtype) if x.is_floating_point() else x
        given = [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in (target, *case.more())]

        self.case, self.backend, self.options, self._x, self._given = case, backend, options, x, given
        self.again()

    def again(self) -> None:
        loss = self.loss(self.case.arranged(self.model(self._x)), *self._given)
        chosen = "aten" if self.backend == "aten" else "triton"
        with satchel.backend(chosen), backpack(*self.features, **self.options):
            loss.backward()

    def fields(self, feature: Any) -> dict[str, Any]:
        named = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        return {name: comparable(feature, getattr(p, feature.field)) for name, p in named.items()}

    def gradients(self) -> dict[str, Any]:
        return {name: p.grad for name, p in self.network.named_parameters() if p.requires_grad}


def comparable(feature: Any, value: Any) -> Any:
    """A field as the reference gives it: a square root V [V, N, *p] is only fixed up to a rotation of its columns, Σ_v V Vᵀ is not."""
    if not feature.field.startswith("sqrt_ggn"):
        return value
    columns = value.flatten(2)
    return torch.einsum("vnp,vnq->npq", columns, columns)


@pytest.fixture
def run() -> type[Pass]:
    return Pass


@pytest.fixture
def no_gc() -> Iterator[None]:
    """What dies in the test dies by reference counts."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


Agree = Callable[..., None]


@pytest.fixture
def agree(request: pytest.FixtureRequest) -> Agree:
    """Compare the fields of all parameters with a reference, by the largest error relative to the largest entry.

    A reference that vanishes next to those of the other parameters is zero by symmetry: its error is relative to theirs.
    """

    def check(actual: dict[str, Any], expected: dict[str, Any], tolerance: float | None = None) -> None:
        assert set(actual) == set(expected)
        rows = {name: (as_list(actual[name]), as_list(expected[name])) for name in expected}
        largest: dict[int, float] = {}
        for name, (values, wanted) in rows.items():
            assert [v.shape for v in values] == [w.shape for w in wanted], name
            for k, w in enumerate(wanted):
                largest[k] = max(largest.get(k, 0.0), w.abs().max().item() if w.numel() else 0.0)
        for name, (values, wanted) in rows.items():
            for k, (value, want) in enumerate(zip(values, wanted, strict=True)):
                limit = TOLERANCE[value.dtype] if tolerance is None else tolerance
                size = want.abs().max().item() if want.numel() else 0.0
                scale = size if size > NEGLIGIBLE[value.dtype] * largest[k] else largest[k] or 1.0
                error = ((value.double().cpu() - want.cpu()).abs().max().item() if want.numel() else 0.0) / scale
                if tolerance is None:
                    request.node.user_properties.append(("error", (str(value.dtype), error)))
                assert error <= limit, f"{name}[{k}]: relative error {error:.1e} > {limit:.0e}\n{value}\n{want}"

    return check


def as_list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, list | tuple) else [value]


# --- the errors seen, over all workers ----------------------------------------------------------------------------

worst: dict[str, tuple[float, str]] = {}
compared: dict[str, int] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, value in report.user_properties if report.when == "call" else []:
        if name == "error":
            dtype, error = cast("tuple[str, float]", value)
            compared[dtype] = compared.get(dtype, 0) + 1
            worst[dtype] = max(worst.get(dtype, (-1.0, "")), (error, report.nodeid))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for dtype, (error, test) in sorted(worst.items()):
        terminalreporter.write_line(
            f"largest relative error of {compared[dtype]} fields, {dtype}: {error:.1e} ({test})"
        )
    if not GPU:
        terminalreporter.write_line("no GPU: nothing ran on one; Triton kernels ran in the interpreter")
