"""Whether an implementation computes what satchel computes: one that does not is no peer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from cells import CELLS, EXPECTATION
from client import Worker
from summary import Cell

#: Relative errors, in the norm of all parameters: of what is deterministic in float32, and of a mean over random draws.
TOLERANCE, RANDOM_TOLERANCE = 1e-3, 0.2
DRAWS = 100


def agreement(reference: Worker, worker: Worker, network: str, cell: str, timeout: float) -> Cell:
    """{"error": the largest}, with {"failed": why} if it is too large."""
    worst = 0.0
    for feature in CELLS[cell]:
        with tempfile.TemporaryDirectory() as folder:
            found = _difference(reference, worker, network, feature, timeout, Path(folder))
        if isinstance(found, str):
            return {"failed": found}
        if found > (RANDOM_TOLERANCE if feature in EXPECTATION else TOLERANCE):
            return {"error": found, "failed": f"computes another {feature}: off by {found:.0%}"}
        worst = max(worst, found)
    return {"error": worst}


def _difference(
    reference: Worker, worker: Worker, network: str, feature: str, timeout: float, folder: Path
) -> float | str:
    """The relative error of a feature, or why there is none. A random feature's mean is compared with the exact feature."""
    expected = EXPECTATION.get(feature, feature)
    common = {"do": "values", "network": network, "cell": feature}
    theirs = worker.ask(
        timeout, **common, features=[feature], repeats=1 if expected == feature else DRAWS, path=str(folder / "theirs")
    )
    variant = worker.about["variant"]
    ours = reference.ask(timeout, **common, features=[expected], repeats=1, path=str(folder / "ours"), variant=variant)
    for answer in (theirs, ours):
        if "failed" in answer:
            return str(answer["failed"])
    return _relative(folder / "ours", expected, folder / "theirs", feature)


def _relative(ours: Path, expected: str, theirs: Path, feature: str) -> float:
    import torch

    pairs = list(_tensors(torch.load(ours)[expected], torch.load(theirs)[feature]))
    difference = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return float((difference / sum(float(a.double().square().sum()) for a, _ in pairs)) ** 0.5)


def _tensors(ours: Any, theirs: Any) -> Any:
    """Pairs of tensors; what the other implementation does not have (None) is left out."""
    if theirs is None:
        return
    if isinstance(ours, list):
        assert len(ours) == len(theirs), f"{len(ours)} tensors, {len(theirs)} of theirs"
        for a, b in zip(ours, theirs, strict=True):
            yield from _tensors(a, b)
    else:
        assert ours.shape == theirs.shape, f"{list(ours.shape)}, theirs {list(theirs.shape)}"
        yield ours, theirs
