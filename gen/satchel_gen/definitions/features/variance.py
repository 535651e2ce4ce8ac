"""Variance of the individual gradients."""

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import SAMPLES, SQUARED_DEVIATIONS, UNIT

VARIANCE = Feature(
    name="Variance",
    field="variance",
    needs={"gradient": (SQUARED_DEVIATIONS,)},
    value=SQUARED_DEVIATIONS.symbol / SAMPLES,
    table5=UNIT**2 * SQUARED_DEVIATIONS.symbol / SAMPLES,
    formula="1/N Σ_n (g_n − 1/N Σ_m g_m)², biased",
    shape="[*θ]",
    reference="Dangel et al., BackPACK, ICLR 2020, Table 5 (batch variance)",
)
