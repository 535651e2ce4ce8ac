"""Individual gradients."""

from satchel_gen.definitions import Feature
from satchel_gen.definitions.quantities import PER_SAMPLE, SAMPLES, UNIT

BATCH_GRAD = Feature(
    name="BatchGrad",
    field="grad_batch",
    needs={"gradient": (PER_SAMPLE,)},
    value=PER_SAMPLE.symbol,
    table5=UNIT * PER_SAMPLE.symbol / SAMPLES,
    formula="g_n = ∇_θ of sample n's contribution to the loss",
    shape="[N, *θ]",
    reference="Dangel et al., BackPACK, ICLR 2020, Table 5 (individual gradients)",
    options=("subsampling",),
)
