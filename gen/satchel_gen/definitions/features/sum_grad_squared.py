"""Second moment of the individual gradients."""

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import SAMPLES, SUM_OF_SQUARES, UNIT

SUM_GRAD_SQUARED = Feature(
    name="SumGradSquared",
    field="sum_grad_squared",
    needs={"gradient": (SUM_OF_SQUARES,)},
    value=SUM_OF_SQUARES.symbol,
    table5=UNIT**2 * SUM_OF_SQUARES.symbol / SAMPLES,
    formula="Σ_n g_n²",
    shape="[*θ]",
    reference="Dangel et al., BackPACK, ICLR 2020, Table 5 (2nd moment)",
)
