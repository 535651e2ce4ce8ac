"""torch.nn.Linear, over any number of axes between batch and features."""

from satchel_gen.definitions import Example, Layer, Refused, Statement, Sum, indices, tensors

n, r, o, i = indices("n r* o i")
x, y, W, b = tensors("input output weight bias")

LINEAR = Layer(
    name="Linear",
    input=x[n, r, i],
    parameters=(W[o, i], b[o]),
    statements=(Statement(y[n, r, o], Sum(W[o, i] * x[n, r, i], i) + b[o]),),
    examples=(
        Example((3,), {"in_features": 3, "out_features": 4}),
        Example((3,), {"in_features": 3, "out_features": 4, "bias": False}),
        Example((5, 3), {"in_features": 3, "out_features": 2}),
        Example((2, 4, 3), {"in_features": 3, "out_features": 5}),
    ),
    refused=(Refused((), "batch", {"in_features": 3, "out_features": 4}),),
)
