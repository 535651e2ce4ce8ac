"""The driver's side of worker.py: a process that is asked, and replaced when it hangs or dies."""

from __future__ import annotations

import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")


class Worker:
    """A process that measures one implementation on request, and its twin that measures memory."""

    def __init__(self, implementation: str, python: str, threads: int, memory_limit: int) -> None:
        self.implementation = implementation
        self._command = [python, str(WORKER), implementation, str(threads), str(memory_limit)]
        self._settings = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        self._timer, self.about = self._start()
        self._forker = self._start(fresh=True)[0] if "failed" not in self.about else self._timer

    def ask(self, timeout: float, **request: Any) -> dict[str, Any]:
        """The answer; {"failed": why} where there is none."""
        forks = request["do"] in ("memory", "values", "count")
        process = self._forker if forks else self._timer
        assert process.stdin is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = _read(process, timeout)
        if process.poll() is not None:
            process = self._start(fresh=forks)[0]
            self._timer, self._forker = (self._timer, process) if forks else (process, self._forker)
        return answer

    def close(self) -> None:
        for process in (self._timer, self._forker):
            process.communicate()

    def _start(self, fresh: bool = False) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        # Every tensor by a mapping of its own, so that what is freed is no longer resident. (Slow: not where time is measured.)
        exact = {"MALLOC_MMAP_THRESHOLD_": "65536"} if fresh else {}
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | self._settings | exact,
            start_new_session=True,
        )
        return process, _read(process, 120)


def _read(process: subprocess.Popen[str], timeout: float) -> dict[str, Any]:
    """One answer. A process that does not give it in time is ended, with its forks."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], timeout)
    line = process.stdout.readline() if ready else ""
    if line:
        answer: dict[str, Any] = json.loads(line)
        return answer
    if not ready:
        os.killpg(process.pid, 9)
    process.wait()
    return {"failed": f"more than {timeout:g} s" if not ready else f"the process died ({process.returncode})"}
