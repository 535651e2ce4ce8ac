"""What was aimed at: CPU ratios on two threads, beside being no slower than any peer in any cell."""

from __future__ import annotations

from cells import FEATURES

#: Geometric means over all cells, of the ratios to the best peer's and to BackPACK's.
BEST_PEER, BACKPACK = 0.55, 0.4
#: What a set of features may cost, in that of its dearest member, beside the writes of the others' results.
SET = 1.1

TARGETS: dict[str, dict[str, float]] = {
    "logreg": {**dict.fromkeys(FEATURES, 2.5), "KFAC": 5.0, "KFLR": 5.0},
    "mlp": {"BatchGrad": 8.0},
    "mlp-sigmoid": {"DiagHessian": 3.2},
    "3c3d": {
        **{"BatchGrad": 1.8, "BatchL2Grad": 1.25, "SumGradSquared": 1.4, "Variance": 1.4},
        **{"DiagGGNExact": 6.0, "DiagGGNMC": 1.55, "DiagHessian": 6.0, "KFAC": 1.8, "KFLR": 3.9},
        **{"first order": 2.1, "all but KFRA": 9.0},
    },
    "allcnnc": {"BatchGrad": 1.4, "DiagGGNExact": 55.0, "KFLR": 35.0},
}
