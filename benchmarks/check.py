"""Whether an implementation computes what satchel computes: one that does not is no peer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from cells import EXPECTATION
from client import Worker
from summary import Cell

#: Relative errors: of what is deterministic, in float32, and of a mean over random draws.
TOLERANCE, RANDOM_TOLERANCE = 1e-3, 0.15
DRAWS = 100


class Different(Exception):
    """Of another shape."""


def agreement(reference: Worker, worker: Worker, network: str, feature: str, timeout: float) -> Cell:
    """{"error": …}, with {"failed": why} if it is too large; {"unchecked": why} where satchel has nothing to compare with.

    A random feature's mean is compared with the exact feature, where two classes alone are likely: then a draw matters little, since
    the gradients for labels of probability ½ are each other's negative.
    """
    expected = EXPECTATION.get(feature, feature)
    draws = 1 if expected == feature else DRAWS
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = str(Path(folder) / "ours"), str(Path(folder) / "theirs")
        common = {"do": "values", "network": network, "cell": feature, "two_classes": draws > 1}
        answer = worker.ask(timeout * draws, **common, features=[feature], repeats=draws, path=theirs)
        if "failed" in answer:
            return answer
        variant = worker.about["variant"]
        answer = reference.ask(timeout, **common, features=[expected], repeats=1, path=ours, variant=variant)
        if "failed" in answer:
            return {"unchecked": f"satchel: {answer['failed']}"}
        try:
            error = _relative(Path(ours), expected, Path(theirs), feature)
        except Different as difference:
            return {"failed": f"computes another {feature}: {difference}"}
    if not error <= (RANDOM_TOLERANCE if feature in EXPECTATION else TOLERANCE):
        return {"error": error, "failed": f"computes another {feature}: off by {error:.1%}"}
    return {"error": error}


def _relative(ours: Path, expected: str, theirs: Path, feature: str) -> float:
    """The largest over the tensors, each in its norm. Not over all at once: an input factor would hide an output factor."""
    import torch

    worst = 0.0
    for a, b in _tensors(torch.load(ours)[expected], torch.load(theirs)[feature]):
        worst = max(worst, float((a - b).norm() / a.norm()) if a.any() else float(b.norm()))
    return worst


def _tensors(ours: Any, theirs: Any) -> Any:
    """Pairs of tensors; what the other implementation does not have (None) is left out."""
    if theirs is None:
        return
    if isinstance(ours, list):
        if len(ours) != len(theirs):
            raise Different(f"{len(theirs)} tensors, not {len(ours)}")
        for a, b in zip(ours, theirs, strict=True):
            yield from _tensors(a, b)
    else:
        if ours.shape != theirs.shape:
            raise Different(f"{list(theirs.shape)}, not {list(ours.shape)}")
        yield ours, theirs
