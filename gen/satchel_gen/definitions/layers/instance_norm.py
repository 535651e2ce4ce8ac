"""torch.nn.InstanceNorm1d, 2d and 3d: every channel of a sample normalised over its positions."""

from satchel_gen.definitions import Example, Layer, Refused, Statement, indices, tensors
from satchel_gen.definitions.standardised import normalised, standardised

n, c, s = indices("n c s*")
x, y, w, b = tensors("input output weight bias")


def instance_norm(rank: int) -> Layer:
    """The layer over `rank` spatial axes."""
    shape = (3, 4, 2)[: rank + 1] if rank < 3 else (3, 2, 1, 4)
    return Layer(
        name=f"InstanceNorm{rank}d",
        input=x[n, c, s],
        parameters=(w[c], b[c]),
        statements=(
            *standardised(x[n, c, s], s),
            Statement(y[n, c, s], w[c] * normalised[n, c, s] + b[c]),
        ),
        options={"track_running_stats": (False,)},
        approximation="backpack",
        examples=(Example(shape, {"num_features": 3}), Example(shape, {"num_features": 3, "affine": True})),
        refused=(
            Refused(shape, "track_running_stats", {"num_features": 3, "affine": True, "track_running_stats": True}),
        ),
    )


INSTANCE_NORM1D, INSTANCE_NORM2D, INSTANCE_NORM3D = map(instance_norm, (1, 2, 3))
