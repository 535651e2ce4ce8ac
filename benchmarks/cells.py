"""What is computed: the ten features, the sets of them that people use together, and nothing."""

from __future__ import annotations

FEATURES = (
    "BatchGrad",
    "BatchL2Grad",
    "SumGradSquared",
    "Variance",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagHessian",
    "KFAC",
    "KFLR",
    "KFRA",
)
#: Cost grows with the number of classes.
EXACT = frozenset({"DiagGGNExact", "DiagHessian", "KFLR", "KFRA"})
#: Random: only their means can be compared, with the exact feature.
EXPECTATION = {"DiagGGNMC": "DiagGGNExact", "KFAC": "KFLR"}

#: What satchel's engine takes by itself: it records, walks, visits every parameter, and computes nothing there.
NOTHING = "nothing"

CELLS: dict[str, tuple[str, ...]] = {
    NOTHING: (NOTHING,),
    **{name: (name,) for name in FEATURES},
    "first order": ("BatchGrad", "Variance", "SumGradSquared", "BatchL2Grad"),
    "DiagGGNMC + KFAC": ("DiagGGNMC", "KFAC"),
    "exact": ("DiagGGNExact", "KFLR", "DiagHessian"),
    "all ten": FEATURES,
    "all but KFRA": tuple(name for name in FEATURES if name != "KFRA"),
}


def is_exact(cell: str) -> bool:
    """Whether a cell is measured on the network's `exact_batch`."""
    return not EXACT.isdisjoint(CELLS[cell])
