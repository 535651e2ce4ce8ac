"""What a user may set: the memory that curvature may take, whether buffers are kept, the backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from .kept import kept

BACKENDS = ("auto", "aten", "triton")
#: Bytes that columns or matrices may take where the user has set no limit: beyond it there is nothing to gain.
UNLIMITED = 1 << 30
#: Likewise, bytes that one step may take besides what it returns.
_STEP = 1 << 27


@dataclass(frozen=True)
class Settings:
    """memory_limit: bytes that one sweep of a curvature factor may hold, or None for no limit. A factor that needs more is
    passed through the network in several ranges of its columns; KFRA's averaged matrix cannot be split and is an error. Fields do
    not count: they are what was asked for. Where there is no limit, a pass whose fields or KFRA matrix alone are larger than the
    memory that the machine has left is an error before it begins; with one, that is the user's affair.

    reuse_buffers: whether the next pass may write fields (256 KB and more, on the CPU) that are individual gradients or products
    of matrices into the memory of this one's. Memory that anything still holds, if only a view, an array or a graph, is left
    alone. What a pass has left on a parameter is kept until another pass over it or the parameter's end, even if the field is
    deleted; False frees it.

    backend: "aten" (plain torch ops), "triton", or "auto": triton on GPU tensors, aten elsewhere.
    """

    memory_limit: int | None = None
    reuse_buffers: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {self.backend!r}")
        if not isinstance(self.reuse_buffers, bool):
            raise ValueError(f"reuse_buffers must be True or False; got {self.reuse_buffers!r}")
        if self.memory_limit is not None and not self.memory_limit > 0:
            raise ValueError(f"memory_limit must be a positive number of bytes or None; got {self.memory_limit!r}")

    @property
    def matrix_bytes(self) -> int:
        """Bytes that columns or matrices may take."""
        return self.memory_limit or UNLIMITED

    @property
    def step_bytes(self) -> int:
        """Bytes that the columns which pass a step at once may take for intermediates."""
        return self.memory_limit or _STEP


_current = Settings()


def current() -> Settings:
    return _current


class settings:
    """Change settings for good, `satchel.settings(memory_limit=2**30)`, or inside a `with` block.

    Raises ValueError for a value out of range and TypeError for a setting that does not exist.
    """

    def __init__(self, **changes: Any) -> None:
        global _current
        unknown = changes.keys() - {field.name for field in fields(Settings)}
        if unknown:
            known = ", ".join(field.name for field in fields(Settings))
            raise TypeError(f"no setting {', '.join(sorted(unknown))}; settings are {known}")
        self._before = _current
        _current = replace(_current, **changes)
        if not _current.reuse_buffers:
            kept.clear()

    def __enter__(self) -> Settings:
        return _current

    def __exit__(self, *exception: object) -> None:
        global _current
        _current = self._before


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the backend, "aten" or "triton", inside a `with` block."""
    with settings(backend=name):
        yield
