"""What emitted Triton kernels read and write, counted load by load in the interpreter.

A load or store counts the elements under its mask, and the bytes that it moves: whole sectors, each once, because threads that
touch one sector in one instruction share a transaction. No cache is assumed: what another load or program reads counts again.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

SECTOR = 32


@dataclass
class Launch:
    """One launch: its kernel, its tensors by the names of their pointers, and what was loaded and stored of each."""

    kernel: str
    tensors: dict[str, Tensor]
    loaded: Counter[str] = field(default_factory=Counter)  # lanes
    stored: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)  # bytes, loaded and stored

    def __post_init__(self) -> None:
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in self.tensors.items() if t.numel())
        self._starts = [start for start, _, _ in spans]
        self._spans = spans

    def count(self, addresses: Any, mask: Any, lanes: Counter[str]) -> None:
        touched = np.asarray(addresses)[np.asarray(mask, dtype=bool)]
        if not touched.size:
            return
        _, end, name = self._spans[bisect.bisect_right(self._starts, int(touched.min())) - 1]
        assert int(touched.max()) < end, f"{self.kernel} leaves {name}"
        lanes[name] += touched.size
        self.moved[name] += np.unique(touched // SECTOR).size * SECTOR

    @property
    def operands(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if name != "out"}

    @property
    def bytes(self) -> int:
        return self.moved.total()


@contextmanager
def counted() -> Iterator[list[Launch]]:
    """The launches of kernels in the block."""
    found: list[Launch] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        found[-1].count(ptrs.data, mask.data, found[-1].loaded)
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found[-1].count(ptrs.data, mask.data, found[-1].stored)
        return store(self, ptrs, value, mask, *rest)

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = {name.removesuffix("_ptr"): value for name, value in named.items() if isinstance(value, Tensor)}
        found.append(Launch(self.fn.__name__, tensors))
        call(self, *args, **kwargs)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(executor, "__call__", counted_call),
    ):
        yield found
