"""Diagonal of the Hessian."""

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import DIAGONAL_SUM, SIGNED_SUM_OF_SQUARES, SUM_OF_SQUARES

DIAG_HESSIAN = Feature(
    name="DiagHessian",
    field="diag_h",
    needs={"exact": (SUM_OF_SQUARES,), "residual": (SIGNED_SUM_OF_SQUARES,), "diagonal": (DIAGONAL_SUM,)},
    value=SUM_OF_SQUARES.symbol + SIGNED_SUM_OF_SQUARES.symbol + DIAGONAL_SUM.symbol,
    formula="diag ∇²L = Σ_{v,n} ± (J_nᵀ s_{v,n})², over the loss's factor and the residuals Σ_o δ_o ∂²y_o",
    shape="[*θ]",
    reference="Dangel et al., BackPACK, ICLR 2020, Table 5 (Hessian diagonal)",
)
