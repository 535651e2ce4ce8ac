"""Diagonals of the generalised Gauss-Newton matrices of single samples, by Monte Carlo."""

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import SAMPLE_SQUARES

BATCH_DIAG_GGN_MC = Feature(
    name="BatchDiagGGNMC",
    field="diag_ggn_mc_batch",
    needs={"mc": (SAMPLE_SQUARES,)},
    value=SAMPLE_SQUARES.symbol,
    formula="1/M Σ_m (J_nᵀ ∇_f ℓ(f_n, ŷ_{m,n}))², ŷ ~ p(· | f_n), for each sample n",
    shape="[N, *θ]",
    reference="Dangel et al., BackPACK, ICLR 2020 (DiagGGN-MC, before it is summed over samples)",
    options=("mc_samples", "generator"),
)
