"""Square root of the generalised Gauss-Newton matrix."""

from sympy import sqrt

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import PER_SAMPLE, SAMPLES, UNIT

SQRT_GGN_EXACT = Feature(
    name="SqrtGGNExact",
    field="sqrt_ggn_exact",
    needs={"exact": (PER_SAMPLE,)},
    value=PER_SAMPLE.symbol,
    table5=sqrt(UNIT / SAMPLES) * PER_SAMPLE.symbol,
    formula="V_{v,n} = J_nᵀ s_{v,n}, with S Sᵀ = ∇²ℓ, so that the matrix is Σ_{v,n} V Vᵀ",
    shape="[V, N, *θ]",
    reference="Dangel et al., ViViT, TMLR 2022; Schraudolph, 2002",
    options=("subsampling",),
)
