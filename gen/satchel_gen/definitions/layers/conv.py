"""torch.nn.Conv1d, Conv2d and Conv3d, and their adjoints ConvTranspose1d, 2d and 3d: one formula for every rank.

y[n, g, o, h…] = Σ_{c, a…} W[g, o, c, a…] x[n, g, c, s·h + d·a − p, …] + b[g, o], zero outside x, in g groups. The adjoint reads
x where that position is: at h = (u + p − d·a) / s, where it is an integer.
"""

from sympy import Expr

from satchel_gen.definitions import Example, Index, Layer, Option, Refused, Statement, Sum, indices, tensors

n, g, o, c = indices("n g o c")
x, y, W, b = tensors("input output weight bias")
PLACES, INPUTS, TAPS = indices("d h w"), indices("id ih iw"), indices("kd kh kw")


def position(k: int, place: Index, tap: Index, transposed: bool) -> Expr:
    """Where axis k of the input is read."""
    stride, dilation, padding = (Option(name, k, integer=True) for name in ("stride", "dilation", "padding"))
    if transposed:
        return (place + padding - dilation * tap) / stride
    return stride * place + dilation * tap - padding


def convolution(rank: int, transposed: bool) -> Layer:
    """The layer over `rank` spatial axes."""
    places, inputs, taps = PLACES[-rank:], INPUTS[-rank:], TAPS[-rank:]
    read = tuple(position(k, place, tap, transposed) for k, (place, tap) in enumerate(zip(places, taps, strict=True)))
    weight = W[(g, c, o, *taps)] if transposed else W[(g, o, c, *taps)]
    shape, channels = (
        ((4,), (4, 5), (3, 5, 2))[rank - 1],
        {"in_channels": 4, "out_channels": 6, "kernel_size": (2, 3, 2)[:rank]},
    )
    return Layer(
        name=f"Conv{'Transpose' if transposed else ''}{rank}d",
        input=x[(n, g, c, *inputs)],
        parameters=(weight, b[g, o]),
        statements=(Statement(y[(n, g, o, *places)], Sum(weight * x[(n, g, c, *read)], c, *taps) + b[g, o]),),
        joined=((g, c), (g, o)),
        extents={g: Option("groups", integer=True)},
        operation="ConvolutionBackward0",
        saved=("stride", "dilation", "padding", "groups"),
        approximation="backpack",
        examples=(
            Example((2, *shape), {"in_channels": 2, "out_channels": 3, "kernel_size": (2, 3, 2)[:rank], "bias": False}),
            Example((4, *shape), channels | {"stride": (2, 1, 2)[:rank], "padding": (1, 0, 1)[:rank], "groups": 2}),
            Example((3, *shape), channels | {"in_channels": 3, "groups": 3, "dilation": (1, 2, 1)[:rank]}),
        ),
        refused=(Refused((4,) * rank, "batch", channels | {"in_channels": 3}),),
    )


CONV1D, CONV2D, CONV3D = (convolution(rank, transposed=False) for rank in (1, 2, 3))
CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, CONV_TRANSPOSE3D = (convolution(rank, transposed=True) for rank in (1, 2, 3))
