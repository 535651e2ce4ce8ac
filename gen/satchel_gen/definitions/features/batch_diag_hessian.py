"""Diagonals of the Hessians of single samples."""

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import SAMPLE_DIAGONAL, SAMPLE_SQUARES, SIGNED_SAMPLE_SQUARES

BATCH_DIAG_HESSIAN = Feature(
    name="BatchDiagHessian",
    field="diag_h_batch",
    needs={"exact": (SAMPLE_SQUARES,), "residual": (SIGNED_SAMPLE_SQUARES,), "diagonal": (SAMPLE_DIAGONAL,)},
    value=SAMPLE_SQUARES.symbol + SIGNED_SAMPLE_SQUARES.symbol + SAMPLE_DIAGONAL.symbol,
    formula="diag ∇²ℓ_n = Σ_v ± (J_nᵀ s_{v,n})², over the loss's factor and the residuals Σ_o δ_o ∂²y_o, for each sample n",
    shape="[N, *θ]",
    reference="Dangel et al., BackPACK, ICLR 2020 (Hessian diagonal, before it is summed over samples)",
)
