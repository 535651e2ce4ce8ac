"""Variance of the individual gradients."""

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import GRADIENT, SAMPLES, SUM_OF_SQUARES, UNIT

VARIANCE = Feature(
    name="Variance",
    field="variance",
    needs={"gradient": (SUM_OF_SQUARES, GRADIENT)},
    value=SUM_OF_SQUARES.symbol / SAMPLES - (GRADIENT.symbol / SAMPLES) ** 2,
    table5=UNIT**2 * SUM_OF_SQUARES.symbol / SAMPLES - (UNIT * GRADIENT.symbol / SAMPLES) ** 2,
    formula="1/N Σ_n g_n² − (1/N Σ_n g_n)², biased",
    shape="[*θ]",
    reference="Dangel et al., BackPACK, ICLR 2020, Table 5 (batch variance)",
)
