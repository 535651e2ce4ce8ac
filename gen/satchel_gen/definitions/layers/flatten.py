"""torch.nn.Flatten: the identity on the elements of a sample; only their arrangement changes."""

from satchel_gen.definitions import Example, Refused, activation, z

FLATTEN = activation(
    "Flatten",
    z,
    examples=(Example((2, 3)), Example((2, 3, 2), {"start_dim": 2})),
    refused=(Refused((2, 3), "batch", {"start_dim": 0}),),
)
