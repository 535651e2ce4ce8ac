"""Diagonal of the generalised Gauss-Newton matrix."""

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import SUM_OF_SQUARES

DIAG_GGN_EXACT = Feature(
    name="DiagGGNExact",
    field="diag_ggn_exact",
    needs={"exact": (SUM_OF_SQUARES,)},
    value=SUM_OF_SQUARES.symbol,
    formula="diag Σ_n J_nᵀ ∇²ℓ_n J_n = Σ_{v,n} (J_nᵀ s_{v,n})², with S Sᵀ = ∇²ℓ",
    shape="[*θ]",
    reference="Dangel et al., BackPACK, ICLR 2020, Table 5 (DiagGGN); Schraudolph, 2002",
)
