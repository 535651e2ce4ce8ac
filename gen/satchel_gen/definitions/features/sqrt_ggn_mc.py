"""Square root of the generalised Gauss-Newton matrix, by Monte Carlo."""

from sympy import sqrt

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import PER_SAMPLE, SAMPLES, UNIT

SQRT_GGN_MC = Feature(
    name="SqrtGGNMC",
    field="sqrt_ggn_mc",
    needs={"mc": (PER_SAMPLE,)},
    value=PER_SAMPLE.symbol,
    table5=sqrt(UNIT / SAMPLES) * PER_SAMPLE.symbol,
    formula="V_{m,n} = J_nᵀ ∇_f ℓ(f_n, ŷ_{m,n}) / √M, ŷ ~ p(· | f_n), so that the matrix is estimated by Σ_{m,n} V Vᵀ",
    shape="[M, N, *θ]",
    reference="Dangel et al., ViViT, TMLR 2022",
    options=("mc_samples", "subsampling", "generator"),
)
