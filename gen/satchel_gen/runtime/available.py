"""How much memory the machine has left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

#: Of control groups, by what /proc/self/cgroup says: where they are, their limit, their use, and what of it can be reclaimed.
_GROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
_ROOT = Path("/sys/fs/cgroup")


def available(device: torch.device) -> int | None:
    """Bytes that can be taken on a device; None where that is not known. Of the CPU, as Linux tells for the system and for groups."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        return min([*_of_system(), *_of_groups()], default=None)
    except (OSError, ValueError):  # another system, or one that does not tell
        return None


def _of_system() -> Iterator[int]:
    said = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    if "MemAvailable" in said:  # kernels before 3.14 do not tell
        yield sum(int(said[name].split()[0]) << 10 for name in ("MemAvailable", "SwapFree") if name in said)


def _of_groups() -> Iterator[int]:
    """What is left in each group that the process is in. Inside a container, the outermost that is seen is its own."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in _GROUPS:
            continue
        folder, limit, use, reclaimable = _GROUPS[controllers]
        own = _ROOT / folder / path.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(_ROOT / folder) and (group / limit).exists():
                bound = (group / limit).read_text().strip()
                said = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                if bound != "max":
                    yield int(bound) - int((group / use).read_text()) + int(said.get(reclaimable, 0))
