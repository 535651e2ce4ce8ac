"""torch.nn.Linear, over any number of axes between batch and features."""

from satchel_gen.definitions import Example, Layer, NodeCall, Refused, Statement, Sum, indices, tensors

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
    nodes=(
        NodeCall("AddmmBackward0", ("mat1", 1), {"weight": (2, (i, o)), "bias": (0, (o,))}, {"alpha": 1, "beta": 1}),
        NodeCall("MmBackward0", ("self", 0), {"weight": (1, (i, o))}),
        NodeCall("AddBackward0", None, {"bias": (0, (o,))}, {"alpha": 1}),
        NodeCall("AddBackward0", None, {"bias": (1, (o,))}, {"alpha": 1}),
    ),
    refused=(Refused((), "batch", {"in_features": 3, "out_features": 4}),),
)
