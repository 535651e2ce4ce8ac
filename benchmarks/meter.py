"""Clocks and the high-water mark of memory."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Step = Callable[[], None]


class Timing(NamedTuple):
    """Seconds per step: elapsed, and spent by all threads of the process."""

    wall: float
    cpu: float


def seconds_per_step(step: Step, steps: int) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return Timing((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)


def trimmed_resident() -> int:
    """Resident bytes, once what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def high_water(step: Step) -> int:
    """The most resident bytes during a step (Linux: the kernel's own mark, which writing 5 resets)."""
    trimmed_resident()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
