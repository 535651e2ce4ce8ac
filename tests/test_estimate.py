"""What a pass needs at the least is known before it begins, and compared with what the machine has left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import satchel
from conftest import FEATURES
from satchel import backpack, extend
from satchel.extensions import KFRA, BatchGrad, SqrtGGNExact, SqrtGGNMC
from satchel.runtime import available, demand, estimate

NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(36, 3)), (2, 4, 4)),
    "loose": (lambda: nn.Sequential(nn.RNN(4, 3, batch_first=True), Last()), (2, 4)),
}
N = 5


class Last(nn.Module):
    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        return given[0][:, -1]


class Trained:
    def __init__(self, network: str) -> None:
        build, shape = NETWORKS[network]
        torch.manual_seed(0)
        self.model, self.loss = extend(build()), extend(nn.CrossEntropyLoss())
        self.x, self.y = torch.randn(N, *shape), torch.arange(N) % 3

    def value(self) -> Tensor:
        return self.loss(self.model(self.x), self.y)

    def individual(self, feature: Any) -> int:
        """Bytes of the fields that are larger than their parameters for the number of samples."""
        fields = [(p, getattr(p, feature.field)) for p in self.model.parameters() if hasattr(p, feature.field)]
        return sum(
            f.nbytes for p, f in fields if isinstance(f, Tensor) and f.shape[f.ndim - p.ndim :] == p.shape != f.shape
        )


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Say how much memory is left. Passes of before, which were too small to ask, are forgotten."""
    demand._known.cache_clear()
    monkeypatch.setattr(estimate, "SMALL", 0)
    return lambda size: monkeypatch.setattr(estimate, "available", lambda device: size)


def run(trained: Trained, *features: Any) -> None:
    with backpack(*features):
        trained.value().backward()


def refused(trained: Trained, features: Sequence[Any], *mentions: str) -> None:
    """Before any field is set."""
    for p in trained.model.parameters():
        vars(p).clear()
    with pytest.raises(MemoryError) as raised:
        run(trained, *features)
    assert all(word in str(raised.value) for word in mentions), raised.value
    assert not any(vars(p) for p in trained.model.parameters())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("feature", [feature for feature in FEATURES if feature is not KFRA])
def test_fields_must_fit(network: str, feature: Any, left: Any) -> None:
    """The estimate is what the fields of individual quantities take, to the byte; of other features it is nothing."""
    trained = Trained(network)
    run(trained, feature())
    size = trained.individual(feature)
    if size:
        left(size - 1)
        refused(trained, (feature(),), feature.__name__, "parameter", f"{size:,}", "smaller")
    left(size)
    run(trained, feature())


@pytest.mark.parametrize(
    "features",
    [(BatchGrad, SqrtGGNExact), (BatchGrad(subsampling=[1, 3]),), (SqrtGGNMC(mc_samples=4, subsampling=[0]),)],
)
def test_several_fields_and_some_samples(features: Any, left: Any) -> None:
    trained = Trained("linear")
    made = [feature() if isinstance(feature, type) else feature for feature in features]
    run(trained, *made)
    size = sum(map(trained.individual, made))
    left(size - 1)
    refused(trained, made, f"{size:,}")
    left(size)
    run(trained, *made)


def test_fields_that_are_overwritten_make_room(left: Any) -> None:
    trained = Trained("linear")
    run(trained, BatchGrad())
    left(0)
    run(trained, BatchGrad())


def test_memory_that_is_kept_makes_room(left: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left(0)
    monkeypatch.setattr(estimate.kept, "clear", lambda: left(1 << 40))
    run(Trained("linear"), BatchGrad())


@pytest.mark.parametrize("network", ["linear", "convolution"])
def test_the_matrix_of_kfra_must_fit(network: str, left: Any) -> None:
    trained = Trained(network)
    left(100)
    refused(trained, (KFRA(),), "KFRA", "bytes", "smaller")


@pytest.mark.parametrize("feature", [BatchGrad, SqrtGGNExact])
def test_a_limit_is_the_users_word(feature: Any, left: Any) -> None:
    """It bounds what a sweep holds, and not the fields."""
    trained = Trained("linear")
    left(0)
    with satchel.settings(memory_limit=1000):
        run(trained, feature())
    assert trained.individual(feature) > 1000


@pytest.mark.parametrize("feature", [BatchGrad, SqrtGGNExact])
def test_small_passes_ask_nothing(feature: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "available", lambda device: pytest.fail("asked"))
    run(Trained("linear"), feature())


# --- what is left -----------------------------------------------------------------------------------------------------

MEMINFO = "MemTotal: 100 kB\nMemFree: 5 kB\nMemAvailable: 40 kB\nSwapFree: 2 kB\n"
V2 = {"memory.max": "{}", "memory.current": "9000", "memory.stat": "anon 1\ninactive_file 1000\n"}
V1 = {
    "memory.limit_in_bytes": "{}",
    "memory.usage_in_bytes": "9000",
    "memory.stat": "cache 1\ntotal_inactive_file 1000\n",
}


def write(folder: Path, files: dict[str, str], limit: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text.format(limit))


@pytest.mark.parametrize(
    "line,files,groups,expected",
    [
        ("0::/", {}, {}, 42 << 10),
        ("0::/a/b", V2, {"a": "max", "a/b": "12000"}, 4000),
        ("0::/a/b", V2, {"a": "11000", "a/b": "max"}, 3000),
        ("0::/outside/the/container", V2, {"": "10000"}, 2000),
        ("0::/a", V2, {"a": str(1 << 40)}, 42 << 10),
        ("4:memory:/a", V1, {"memory": str(1 << 60), "memory/a": "12000"}, 4000),
        ("5:cpu:/a", V1, {"cpu/a": "12000"}, 42 << 10),
    ],
)
def test_available(line: str, files: Any, groups: Any, expected: int, tmp_path: Path, monkeypatch: Any) -> None:
    """The least that the system and the control groups of the process leave."""
    for group, limit in groups.items():
        write(tmp_path / group, files, limit)
    said = {"/proc/meminfo": MEMINFO, "/proc/self/cgroup": line + "\n"}
    read = Path.read_text
    monkeypatch.setattr(available, "_ROOT", tmp_path)
    monkeypatch.setattr(Path, "read_text", lambda path: said.get(str(path)) or read(path))
    assert available.available(torch.device("cpu")) == expected


def test_old_kernels_do_not_tell_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"/proc/meminfo": "MemTotal: 100 kB\nMemFree: 5 kB\nSwapFree: 2 kB\n", "/proc/self/cgroup": ""}
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: said[str(path)] if str(path) in said else read(path))
    assert available.available(torch.device("cpu")) is None


def test_what_is_not_told_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(path)

    assert available.available(torch.device("meta")) is None
    monkeypatch.setattr(Path, "read_text", refuse)
    assert available.available(torch.device("cpu")) is None


def test_of_a_gpu_what_torch_holds_free_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert available.available(torch.device("cuda")) == 130
