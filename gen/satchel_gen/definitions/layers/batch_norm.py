"""torch.nn.BatchNorm1d, 2d and 3d with fixed statistics (evaluation mode)."""

from sympy import Rational

from satchel_gen.definitions import Example, Layer, Option, Refused, Statement, indices, tensors

n, c, s = indices("n c s*")
x, y, w, b, mean, variance = tensors("input output weight bias running_mean running_var")


def batch_norm(rank: int) -> Layer:
    """The layer over `rank` spatial axes."""
    shape = (3, 4, 2)[: rank + 1] if rank < 3 else (3, 2, 1, 4)
    normalised = (x[n, c, s] - mean[c]) * (variance[c] + Option("eps")) ** Rational(-1, 2)
    return Layer(
        name=f"BatchNorm{rank}d",
        input=x[n, c, s],
        parameters=(w[c], b[c]),
        buffers=(mean[c], variance[c]),
        statements=(Statement(y[n, c, s], w[c] * normalised + b[c]),),
        options={"training": (False,), "track_running_stats": (True,)},
        reasons=dict.fromkeys(
            ("training", "track_running_stats"),
            "with statistics of the batch, samples mix and individual gradients do not exist. Call eval() on the layer, which"
            " freezes its statistics, or use GroupNorm, LayerNorm or InstanceNorm",
        ),
        approximation="backpack",
        examples=(
            Example(shape, {"num_features": 3}, training=False),
            Example(shape, {"num_features": 3, "affine": False}, training=False),
        ),
        refused=(Refused(shape, "GroupNorm", {"num_features": 3}),),
    )


BATCH_NORM1D, BATCH_NORM2D, BATCH_NORM3D = map(batch_norm, (1, 2, 3))
