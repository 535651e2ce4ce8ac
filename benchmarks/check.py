"""Whether an implementation computes what satchel computes: one that does not is no peer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from cells import EXPECTATION
from client import Worker
from summary import Cell

#: Relative errors: of what is deterministic, in float32, and of the traces of a mean over random draws.
TOLERANCE, RANDOM_TOLERANCE = 1e-3, 0.1
DRAWS = 100


def agreement(reference: Worker, worker: Worker, network: str, feature: str, timeout: float) -> Cell:
    """{"error": …}, with {"failed": why} if it is too large."""
    with tempfile.TemporaryDirectory() as folder:
        error = _error(reference, worker, network, feature, timeout, Path(folder))
    if isinstance(error, str):
        return {"failed": error}
    if not error <= (RANDOM_TOLERANCE if feature in EXPECTATION else TOLERANCE):
        return {"error": error, "failed": f"computes another {feature}: off by {error:.1%}"}
    return {"error": error}


def _error(reference: Worker, worker: Worker, network: str, feature: str, timeout: float, folder: Path) -> float | str:
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
    """The largest over the tensors, each in its norm. Not over all at once: an input factor would hide an output factor."""
    import torch

    worst = 0.0
    for a, b in _tensors(torch.load(ours)[expected], torch.load(theirs)[feature]):
        if feature in EXPECTATION:
            a, b = _trace(a, feature), _trace(b, feature)
        worst = max(worst, float((a - b).norm() / a.norm()) if a.any() else float(b.norm()))
    return worst


def _trace(tensor: Any, feature: str) -> Any:
    """Of a matrix that is given by its diagonal, or as a factor."""
    return tensor.trace() if feature == "KFAC" else tensor.sum()


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
