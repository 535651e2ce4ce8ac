"""Large results: huge pages are asked for where there are enough, and never change what is computed."""

from __future__ import annotations

import pytest
import torch

from satchel.runtime import memory


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
    tensor = memory.empty((1, size), like)
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
