"""Diagonals of the generalised Gauss-Newton matrices of single samples."""

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import SAMPLE_SQUARES

BATCH_DIAG_GGN_EXACT = Feature(
    name="BatchDiagGGNExact",
    field="diag_ggn_exact_batch",
    needs={"exact": (SAMPLE_SQUARES,)},
    value=SAMPLE_SQUARES.symbol,
    formula="diag J_nᵀ ∇²ℓ_n J_n = Σ_v (J_nᵀ s_{v,n})², with S Sᵀ = ∇²ℓ, for each sample n",
    shape="[N, *θ]",
    reference="Dangel et al., BackPACK, ICLR 2020 (DiagGGN, before it is summed over samples); Schraudolph, 2002",
)
