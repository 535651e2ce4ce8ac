"""Memory of large results: huge pages where there are enough, and what the previous pass has left where nobody holds it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import satchel
from cases import Case, Network
from conftest import EXACT, Agree, Pass, as_if_large, as_list
from satchel import backpack, extend
from satchel.extensions import KFLR, BatchGrad, BatchL2Grad, DiagGGNExact, SumGradSquared, Variance
from satchel.runtime import blocks, cost, matmul, memory


class Library:
    def __init__(self) -> None:
        self.advised: list[int] = []

    def madvise(self, start, length, advice) -> int:
        self.advised.append(length.value)
        return -1


@pytest.mark.parametrize("size", [memory.FRESH // 4 - 1, memory.FRESH // 4])
@pytest.mark.parametrize("free", [0, 1 << 40])
def test_huge_pages_are_asked_for_where_there_are_enough(size, free, monkeypatch):
    library = Library()
    monkeypatch.setattr(memory, "_libc", library)
    monkeypatch.setattr(memory, "_free_in_huge_pages", lambda: free)
    like = torch.zeros(1, dtype=torch.float32)
    tensor = memory.empty((1, size), like.dtype, like)
    assert tensor.shape == (1, size) and tensor.dtype == like.dtype and tensor.device == like.device
    assert len(library.advised) == (4 * size >= memory.FRESH and free > 0)
    assert all(0 <= length <= 4 * size and length % (1 << 21) == 0 for length in library.advised)


def test_what_is_free_is_read_from_the_system(monkeypatch):
    lines = "Node 0, zone      DMA      1      0      0      0      0      0      0      0      7      2      3\n"
    monkeypatch.setattr(memory.Path, "read_text", lambda self: lines)
    assert memory._free_in_huge_pages() == 2 * (2 << 20) + 3 * (4 << 20)

    def refuse(self):
        raise PermissionError

    monkeypatch.setattr(memory.Path, "read_text", refuse)
    assert memory._free_in_huge_pages() == 0


# --- what a pass has left ---------------------------------------------------------------------------------------------

N, IN, OUT = 16, 64, 64
assert 4 * N * IN * OUT == memory.KEPT


class Trained:
    """A layer whose individual gradients are just large enough to be kept."""

    def __init__(self) -> None:
        self.layer = extend(nn.Linear(IN, OUT, bias=False))
        self.weight: Any = self.layer.weight
        self.loss = extend(nn.MSELoss(reduction="sum"))

    def run(self, seed: int, *features: Any, samples: int = N, create_graph: bool = False) -> Tensor:
        """A pass on a batch of its own; what the field must be."""
        x = torch.randn(samples, IN, generator=torch.Generator().manual_seed(seed))
        with backpack(*features or [BatchGrad()]):
            self.loss(self.layer(x), torch.zeros(samples, OUT)).backward(create_graph=create_graph)
        with torch.no_grad():
            return torch.einsum("no,ni->noi", 2 * self.layer(x), x)

    def left(self) -> StorageWeakRef:
        return StorageWeakRef(self.weight.grad_batch.untyped_storage())


def in_graph(field: Tensor) -> Any:
    return (torch.ones((), requires_grad=True) * field).grad_fn


def in_shared_memory(field: Tensor) -> None:
    """Another process may have it mapped, and nothing in this one holds it."""
    field.share_memory_()


#: Who may hold the memory of a field, and how to read it there.
HOLDERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "itself": (lambda field: field, lambda held: held),
    "view": (lambda field: field[1:, :2], lambda held: held),
    "detached": (lambda field: field.detach(), lambda held: held),
    "array": (lambda field: field.numpy(), torch.from_numpy),
    "buffer": (lambda field: memoryview(field.numpy()), lambda held: torch.frombuffer(held, dtype=torch.float32)),
    "dlpack": (torch.utils.dlpack.to_dlpack, torch.utils.dlpack.from_dlpack),
    "storage": (lambda field: field.untyped_storage(), lambda held: torch.tensor([]).set_(held)),
    "graph": (in_graph, lambda held: held._saved_other),
    "shared memory": (in_shared_memory, lambda held: torch.zeros(0)),
}


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_what_is_held_is_never_overwritten(holder: str, deleted: bool) -> None:
    hold, read = HOLDERS[holder]
    trained = Trained()
    trained.run(0)
    before = trained.weight.grad_batch.clone()
    held = hold(trained.weight.grad_batch)
    there = trained.weight.grad_batch.data_ptr()
    if deleted:
        del trained.weight.grad_batch
    for seed in (1, 2):
        expected = trained.run(seed)
        assert torch.allclose(trained.weight.grad_batch, expected, atol=1e-4)
        assert trained.weight.grad_batch.data_ptr() != there and not trained.weight.grad_batch.is_shared()
    assert torch.equal(read(held), read(hold(before)))


@pytest.mark.parametrize("deleted", [False, True])
def test_what_nobody_holds_is_written_again(deleted: bool) -> None:
    trained = Trained()
    trained.run(0)
    there = trained.weight.grad_batch.data_ptr()
    for seed in (1, 2):
        if deleted:
            del trained.weight.grad_batch
        expected = trained.run(seed)
        assert trained.weight.grad_batch.data_ptr() == there
        assert torch.allclose(trained.weight.grad_batch, expected, atol=1e-4)


def other_size(trained: Trained) -> Tensor:
    return trained.run(1, samples=2 * N)


def differentiable(trained: Trained) -> Tensor:
    return trained.run(1, create_graph=True)


def resized(trained: Trained) -> Tensor:
    trained.weight.grad_batch.untyped_storage().resize_(0)
    return trained.run(1)


@pytest.mark.parametrize("run", [other_size, differentiable, resized])
def test_what_does_not_fit_is_left(run: Callable[[Trained], Tensor]) -> None:
    trained = Trained()
    trained.run(0)
    left = trained.left()
    expected = run(trained)
    assert torch.allclose(trained.weight.grad_batch, expected, atol=1e-4)
    assert trained.weight.grad_batch.requires_grad == (run is differentiable)
    trained.weight.grad = None  # the graph of create_graph
    gc.collect()
    assert left.expired()


def forget(trained: Trained) -> None:
    trained.weight = trained.layer = None


def turn_off(trained: Trained) -> None:
    with satchel.settings(reuse_buffers=False):
        pass


def pass_without(trained: Trained) -> None:
    trained.run(1, BatchL2Grad())


def pass_while_off(trained: Trained) -> None:
    with satchel.settings(reuse_buffers=False):
        trained.run(1)
        del trained.weight.grad_batch


@pytest.mark.parametrize("end", [forget, turn_off, pass_without, pass_while_off])
def test_nothing_is_kept_for_longer(end: Callable[[Trained], None]) -> None:
    trained = Trained()
    trained.run(0)
    left = trained.left()
    del trained.weight.grad_batch
    gc.collect()
    assert not left.expired()
    end(trained)
    gc.collect()
    assert left.expired()


def test_the_setting_is_a_truth_value() -> None:
    with pytest.raises(ValueError, match="reuse_buffers"):
        satchel.settings(reuse_buffers=1)


@pytest.mark.filterwarnings("error:An output with one or more elements was resized")
@pytest.mark.parametrize("cache", [1, 1 << 18])
def test_fields_where_those_before_were(
    network: Network, cache: int, agree: Agree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small, they are written into the memory of the pass before, whose numbers these are not; in many blocks or one."""
    as_if_large(monkeypatch, cache)
    case = Case(network, nn.MSELoss, "mean")
    done = Pass(case, torch.float64, "aten", *(feature() for feature in EXACT))
    for parameter in done.network.parameters():
        for feature in EXACT if parameter.requires_grad else ():
            for tensor in as_list(vars(parameter).pop(feature.field)):
                tensor.fill_(torch.nan)
    done.again()
    reference = case.reference()
    for feature in EXACT:
        expected = {name: reference.field(feature.__name__, name) for name in reference.parameters}
        agree(done.fields(feature), expected)


@pytest.mark.parametrize(
    "layer,shape,feature",
    [
        (partial(nn.Linear, 300, 260), (300,), SumGradSquared),
        (partial(nn.Linear, 300, 260), (300,), DiagGGNExact),
        (partial(nn.Linear, 300, 260), (300,), KFLR),
        (partial(nn.Conv2d, 32, 4, 3), (32, 4, 4), KFLR),
    ],
)
def test_products_where_those_before_were(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], feature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diagonals of fully connected layers, and Kronecker factors; but where oneDNN is far ahead, which writes nowhere."""
    monkeypatch.setattr(matmul, "onednn_speed", lambda: 1.0)
    x = torch.randn(17, *shape)
    network = nn.Sequential(layer(), nn.Flatten(), nn.LazyLinear(2))
    network(x)
    extend(network)

    def places() -> dict[tuple[str, int], int]:
        with backpack(feature()):
            extend(nn.CrossEntropyLoss())(network(x), torch.zeros(17, dtype=torch.int64)).backward()
        fields = {name: as_list(vars(p).pop(feature.field)) for name, p in network.named_parameters()}
        large = {(name, k): t for name, ts in fields.items() for k, t in enumerate(ts) if t.nbytes >= memory.KEPT}
        return {key: tensor.data_ptr() for key, tensor in large.items()}

    first = places()
    taken = torch.zeros(1 << 20)  # what is free
    assert first and places() == first, taken


# --- what intermediates share -----------------------------------------------------------------------------------------


def gathered(network: nn.Module, x: Tensor, features: list[Any]) -> list[Tensor]:
    """A pass with the positions of its tokens in one sample; the fields."""
    loss = extend(nn.MSELoss(reduction="sum"))
    with backpack(*features):
        loss(network(x), torch.zeros_like(network(x))).backward()
    return [getattr(p, feature.field) for p in network.parameters() for feature in features]


@pytest.mark.parametrize("block", [1, 1 << 18])
@pytest.mark.parametrize(
    "features", [[SumGradSquared()], [Variance()], [BatchL2Grad()], [SumGradSquared(), Variance()]]
)
def test_no_field_lies_on_it(features: list[Any], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "machine", replace(cost.machine, cache_elements=block))
    network = extend(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)))
    asked: list[Any] = []
    monkeypatch.setattr(blocks, "shared", lambda *given: asked.append(given) or memory.shared(*given))
    with cost.forced("blockwise"):
        fields = gathered(network, torch.randn(3, 4, 7), features)
        before = [field.clone() for field in fields]
        memory._shared.blocks.whole.fill_(255)  # not a number
        assert all(map(torch.equal, fields, before))
        assert asked
        with satchel.settings(reuse_buffers=False):
            again = gathered(network, torch.randn(3, 4, 7), features)
    assert all(field.isfinite().all() for field in again)


def test_each_thread_has_its_own() -> None:
    here = memory.shared((3,), torch.float64, torch.device("cpu"))
    with torch.device("meta"):  # what tensors are by default does not matter
        here_too = memory._Shared()
    assert here_too.blocks.whole.device.type == here_too.scratch.whole.device.type == "cpu"
    there = ThreadPoolExecutor(1).submit(memory.shared, (3,), torch.float64, torch.device("cpu")).result()
    assert here.data_ptr() != there.data_ptr()
    assert here.data_ptr() == memory.shared((2, 4), torch.float32, torch.device("cpu")).data_ptr()
    assert memory.shared((memory._SHARED + 1,), torch.uint8, torch.device("cpu")) is None
