"""Kronecker-factored curvature by the averaged recursion."""

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import AVERAGED_FACTOR, BLOCK, INPUT_FACTOR_BACKPACK

KFRA = Feature(
    name="KFRA",
    field="kfra",
    needs={"averaged": (AVERAGED_FACTOR, BLOCK), "input": (INPUT_FACTOR_BACKPACK,)},
    value={"backpack": (AVERAGED_FACTOR, INPUT_FACTOR_BACKPACK)},
    block=BLOCK,
    formula="G ≈ B ⊗ A, A = 1/N Σ_n a_n a_nᵀ, B = Ḡ with Ḡ ← 1/N Σ_n J_nᵀ Ḡ J_n from Σ_n ∇²ℓ_n",
    shape="[B, A]; [B] for a bias; [G] for a parameter without Kronecker structure",
    reference="Botev et al., 2017; Dangel et al., BackPACK, ICLR 2020, Table 5 (KFRA)",
)
