"""Diagonal of the generalised Gauss-Newton matrix, by Monte Carlo."""

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import SUM_OF_SQUARES

DIAG_GGN_MC = Feature(
    name="DiagGGNMC",
    field="diag_ggn_mc",
    needs={"mc": (SUM_OF_SQUARES,)},
    value=SUM_OF_SQUARES.symbol,
    formula="1/M Σ_{m,n} (J_nᵀ ∇_f ℓ(f_n, ŷ_{m,n}))², ŷ ~ p(· | f_n)",
    shape="[*θ]",
    reference="Dangel et al., BackPACK, ICLR 2020, Table 5 (DiagGGN-MC)",
    options=("mc_samples", "generator"),
)
