"""Measures one implementation in its own process and interpreter; needs torch and that implementation, nothing else.

Speaks JSON lines. Every request names a network and a cell and what to `do`:
    prepare  build both steps and run them; how many steps make a timing
    time     seconds per step of wall and CPU, plain and with the features, one right after the other
    memory   bytes of the two peaks above the process's own, in a fork
    values   write the results of a small batch to `path`
    count    the work of satchel's rules (see bound.py)
    machine  what the machine can do (see bound.py)
The answer is an object; {"failed": why} where it could not be done.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
from typing import Any

# Before torch loads: idle OpenMP threads must not spin on the cores that the other process measures on.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

import bound
from cells import CELLS, is_exact
from meter import high_water, seconds_per_step, trimmed_resident
from peers import PEERS, Unsupported, build
from problems import NETWORKS, Task

TIMING = 0.05
SMALL = 3


class Steps:
    """A plain step and one with features, each with what it leaves freed."""

    def __init__(self, implementation: str, network: str, cell: str, batch: int | None = None) -> None:
        self._plain, self._extended = (NETWORKS[network].task(is_exact(cell), batch) for _ in range(2))
        self._compute = build(implementation, self._extended, CELLS[cell])

    def plain(self) -> None:
        task = self._plain
        task.loss(task.model(task.x), task.y).backward()
        task.model.zero_grad()

    def extended(self) -> None:
        self._compute()
        self._extended.model.zero_grad()


def prepare(steps: Steps) -> dict[str, int]:
    """Warms up. Short steps are repeated until a timing is long enough to read."""
    counts = {}
    for name, step in (("plain", steps.plain), ("feature", steps.extended)):
        first = seconds_per_step(step, 1).wall
        again = first if first > TIMING * 10 else seconds_per_step(step, 1).wall
        counts[name] = max(1, min(50, round(TIMING / again)))
    return counts


def memory(implementation: str, network: str, cell: str) -> dict[str, int]:
    """Peaks above what the process holds once a tiny batch has loaded all code. Both steps have run before.

    The plain step comes first: what an implementation keeps between steps is no part of the gradient.
    """
    tiny = Steps(implementation, network, cell, batch=1)
    tiny.plain()
    tiny.extended()
    steps = Steps(implementation, network, cell)
    own = trimmed_resident()
    steps.plain()
    plain = high_water(steps.plain)
    steps.extended()
    return {"plain": plain - own, "feature": high_water(steps.extended) - own}


def values(implementation: str, request: dict[str, Any]) -> dict[str, Any]:
    """The mean over `repeats` of what is computed on a small batch, written to `path`."""
    task: Task = NETWORKS[request["network"]].task(batch=SMALL)
    if request["two_classes"]:  # the last parameter is the bias of the classes, in every network
        with torch.no_grad():
            list(task.model.parameters())[-1][:2] += 20
    if variant := request.get("variant"):
        compute = importlib.import_module(f"peers.{PEERS[implementation]}").build(task, request["features"], variant)
    else:
        compute = build(implementation, task, tuple(request["features"]))
    total = compute()
    for _ in range(request["repeats"] - 1):
        total = _added(total, compute())
    torch.save(_added(total, None, 1 / request["repeats"]), request["path"])
    return {}


def _added(a: Any, b: Any, scale: float = 1.0) -> Any:
    if isinstance(a, dict):
        return {key: _added(a[key], b and b[key], scale) for key in a}
    if isinstance(a, list | tuple):
        return [_added(x, b and b[i], scale) for i, x in enumerate(a)]
    return None if a is None else (a.detach() if b is None else a.detach() + b.detach()) * scale


def describe(name: str) -> dict[str, Any]:
    peer = importlib.import_module(f"peers.{PEERS[name]}")
    return {
        "version": importlib.metadata.version(peer.DISTRIBUTION),
        "features": sorted(peer.FEATURES),
        "variant": peer.VARIANT,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def forked(work: Any) -> dict[str, Any]:
    """The answer of `work` in a fork, whose memory nothing has touched before. Before any parallel region: OpenMP does not fork."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps(attempt(work)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    answer: dict[str, Any] = json.loads(text or '{"failed": "out of memory"}')
    return answer


def attempt(work: Any) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = work()
        return answer
    except Unsupported as error:
        return {"failed": str(error)}
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "can't allocate memory" in text:
            return {"failed": "out of memory"}
        return {"failed": f"{type(error).__name__}: {text[:300]}"}


def serve(name: str, threads: int, memory_limit: int) -> None:
    """Answer requests until the input ends. Steps of one network are kept."""
    torch.set_num_threads(threads)
    # An allocation beyond fails in Python, where the system would end a process of its own choice.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print
    print(json.dumps(attempt(lambda: describe(name))), file=answers, flush=True)
    current, built = "", dict[str, Steps]()

    def steps(network: str, cell: str) -> Steps:
        nonlocal current
        if network != current:
            current = network
            built.clear()
        if cell not in built:
            built[cell] = Steps(name, network, cell)
        return built[cell]

    for line in sys.stdin:
        request = json.loads(line)
        at = request["network"], request["cell"]
        match request["do"]:
            case "prepare":
                answer = attempt(lambda at=at: prepare(steps(*at)))
            case "time":
                answer = attempt(
                    lambda at=at, counts=request["steps"]: {
                        "plain": seconds_per_step(steps(*at).plain, counts["plain"])._asdict(),
                        "feature": seconds_per_step(steps(*at).extended, counts["feature"])._asdict(),
                    }
                )
            case "memory":
                answer = forked(lambda at=at: memory(name, *at))
            case "values":
                answer = forked(lambda request=request: values(name, request))
            case "count":
                answer = forked(lambda at=at: bound.count(*at))
            case "machine":
                answer = attempt(bound.machine)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
