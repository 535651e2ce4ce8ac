"""torch.nn's dropout: linear, given the mask that the forward pass drew; the identity in evaluation mode."""

from satchel_gen.definitions import Example, Passing

MASKED = "output[n, …] = mask[n, …] input[n, …] / (1 − p), the mask as it was drawn"


def dropout(name: str, shape: tuple[int, ...], formula: str = MASKED) -> Passing:
    """The module with an example in evaluation mode; what training draws is not known beforehand."""
    return Passing(name, formula, examples=(Example(shape, training=False),))


DROPOUT = dropout("Dropout", (2, 3))
DROPOUT1D = dropout("Dropout1d", (2, 3))
DROPOUT2D = dropout("Dropout2d", (2, 3, 2))
DROPOUT3D = dropout("Dropout3d", (2, 3, 2, 2))
ALPHA_DROPOUT = dropout("AlphaDropout", (2, 3), "output[n, …] = a (mask[n, …] input[n, …] + α′ (1 − mask[n, …])) + b")
FEATURE_ALPHA_DROPOUT = dropout("FeatureAlphaDropout", (2, 3), "as AlphaDropout, whole channels at a time")
