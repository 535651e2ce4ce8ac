"""torch.nn's modules that rearrange or interpolate the elements of a sample."""

from satchel_gen.definitions import Example, Passing

UNFLATTEN = Passing(
    "Unflatten",
    "output[n, …, i, j, …] = input[n, …, i·J + j, …]",
    examples=(Example((6,), {"dim": 1, "unflattened_size": (2, 3)}),),
)
PIXEL_SHUFFLE = Passing(
    "PixelShuffle",
    "output[n, c, r·h + i, r·w + j] = input[n, (c·r + i)·r + j, h, w]",
    examples=(Example((8, 2, 3), {"upscale_factor": 2}),),
)
PIXEL_UNSHUFFLE = Passing(
    "PixelUnshuffle",
    "output[n, (c·r + i)·r + j, h, w] = input[n, c, r·h + i, r·w + j]",
    examples=(Example((2, 2, 4), {"downscale_factor": 2}),),
)
CHANNEL_SHUFFLE = Passing(
    "ChannelShuffle",
    "output[n, c·g + i, …] = input[n, i·C/g + c, …]",
    examples=(Example((6, 2, 3), {"groups": 3}),),
)
UPSAMPLE = Passing(
    "Upsample",
    "output[n, c, h…] = Σ_u weight[h, u] input[n, c, u, …], the weights of nearest, linear, bilinear, trilinear or bicubic",
    examples=(
        Example((2, 3), {"scale_factor": 2}),
        Example((2, 3), {"size": 5, "mode": "linear", "align_corners": True}),
        Example((2, 2, 3), {"scale_factor": 2, "mode": "bilinear"}),
        Example((2, 3, 2), {"size": (4, 5), "mode": "nearest"}),
        Example((1, 2, 3, 2), {"scale_factor": 2, "mode": "trilinear"}),
    ),
)
