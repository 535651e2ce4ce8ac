"""Few threads for little work, and as many as before after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from satchel.runtime.modes import with_few_threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("calls,threads", [(10, 1), (1, 2)])
def test_threads_while_it_runs(calls: int, threads: int) -> None:
    """100 µs of work: 50 are saved by a second thread, whose waking takes 30 for each call."""
    seen: list[int] = []

    def function(tensor: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return tensor

    with_few_threads(function, 1e-4, calls, [torch.zeros(1)], {})
    assert seen == [threads]
    assert torch.get_num_threads() == 2


def test_threads_after_an_error() -> None:
    def function(tensor: Tensor) -> Tensor:
        raise ValueError

    with pytest.raises(ValueError):
        with_few_threads(function, 0.0, 1, [torch.zeros(1)], {})
    assert torch.get_num_threads() == 2
