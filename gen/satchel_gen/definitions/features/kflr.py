"""Kronecker-factored curvature with the exact factor of the loss's Hessian."""

from satchel_gen.definitions import Feature
from satchel_gen.definitions.features.kfac import FACTORS, INPUTS, OUTPUTS
from satchel_gen.definitions.quantities import BLOCK

KFLR = Feature(
    name="KFLR",
    field="kflr",
    needs={"exact": OUTPUTS, "input": INPUTS},
    value=FACTORS,
    block=BLOCK,
    formula="G ≈ B ⊗ A, A = 1/N Σ_n a_n a_nᵀ, B = Σ_{v,n} s sᵀ with the exact factor, S Sᵀ = ∇²ℓ",
    shape="[B, A]; [B] for a bias; [G] for a parameter without Kronecker structure",
    reference="Botev et al., 2017; Dangel et al., BackPACK, ICLR 2020, Table 5 (KFLR); Eschenhagen et al., 2023",
    options=("approximation",),
)
