"""torch.nn.Embedding: rows of a table. The padding row is a constant, so the formula leaves it out."""

from satchel_gen.definitions import Equal, Example, Layer, Option, Refused, Statement, Sum, indices, tensors

n, r, k, d = indices("n r* k d")
x, y, W = tensors("input output weight")
SIZES = {"num_embeddings": 5, "embedding_dim": 3}

EMBEDDING = Layer(
    name="Embedding",
    input=x[n, r],
    parameters=(W[k, d],),
    statements=(Statement(y[n, r, d], Sum(Equal(k, x[n, r]) * (1 - Equal(k, Option("padding_idx"))) * W[k, d], k)),),
    absent={"padding_idx": -1},
    options={"max_norm": (None,), "scale_grad_by_freq": (False,), "sparse": (False,)},
    reasons={
        "max_norm": "the forward pass changes the table in place",
        "scale_grad_by_freq": "its gradient is not that of the loss",
        "sparse": "fields are dense tensors",
    },
    examples=(
        Example((4,), SIZES, below=5),
        Example((2, 4), SIZES | {"padding_idx": 2}, below=5),
        Example((), SIZES, below=5),
    ),
    refused=(
        Refused((4,), "in place", SIZES | {"max_norm": 1.0}, below=5),
        Refused((4,), "dense", SIZES | {"sparse": True}, below=5),
        Refused((4,), "scale_grad_by_freq", SIZES | {"scale_grad_by_freq": True}, below=5),
    ),
)
