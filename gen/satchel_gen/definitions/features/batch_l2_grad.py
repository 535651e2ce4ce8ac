"""Norms of the individual gradients."""

from sympy import sqrt

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import SAMPLES, SQUARED_NORM, UNIT

BATCH_L2_GRAD = Feature(
    name="BatchL2Grad",
    field="batch_l2",
    needs={"gradient": (SQUARED_NORM,)},
    value=SQUARED_NORM.symbol,
    table5=UNIT * sqrt(SQUARED_NORM.symbol) / SAMPLES,
    formula="‖g_n‖², squared",
    shape="[N]",
    reference="Dangel et al., BackPACK, ICLR 2020, Table 5 (individual gradient L2 norm)",
)
