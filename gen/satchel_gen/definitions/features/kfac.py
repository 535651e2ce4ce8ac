"""Kronecker-factored curvature, by Monte Carlo."""

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import (
    BLOCK,
    INPUT_FACTOR_BACKPACK,
    INPUT_FACTOR_EXPAND,
    INPUT_FACTOR_REDUCE,
    OUTPUT_FACTOR_EXPAND,
    OUTPUT_FACTOR_REDUCE,
)

#: Factors per approximation, output factor first; KFAC and KFLR differ in the columns s alone.
FACTORS = {
    "expand": (OUTPUT_FACTOR_EXPAND, INPUT_FACTOR_EXPAND),
    "reduce": (OUTPUT_FACTOR_REDUCE, INPUT_FACTOR_REDUCE),
    "backpack": (OUTPUT_FACTOR_REDUCE, INPUT_FACTOR_BACKPACK),
}
OUTPUTS, INPUTS = (
    (OUTPUT_FACTOR_EXPAND, OUTPUT_FACTOR_REDUCE, BLOCK),
    (INPUT_FACTOR_EXPAND, INPUT_FACTOR_REDUCE, INPUT_FACTOR_BACKPACK),
)

KFAC = Feature(
    name="KFAC",
    field="kfac",
    needs={"mc": OUTPUTS, "input": INPUTS},
    value=FACTORS,
    block=BLOCK,
    formula="G ≈ B ⊗ A, A = 1/N Σ_n a_n a_nᵀ, B = Σ_{m,n} s sᵀ with s = ∇ℓ(f, ŷ_m)/√M at the layer's output",
    shape="[B, A]; [B] for a bias; [G] for a parameter without Kronecker structure",
    reference="Martens & Grosse, 2015; Dangel et al., BackPACK, ICLR 2020, Table 5 (KFAC); Eschenhagen et al., 2023",
    options=("mc_samples", "generator", "approximation"),
)
