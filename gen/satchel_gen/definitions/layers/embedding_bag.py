"""torch.nn.EmbeddingBag on [N, R] indices: sums and means of rows of a table."""

from sympy import Expr, Integer

from satchel_gen.definitions import Equal, Example, Layer, Refused, Statement, Sum, extent, indices, tensors

n, r, k, d = indices("n r k d")
x, y, W = tensors("input output weight")
SIZES = {"num_embeddings": 5, "embedding_dim": 3}


def bag(mode: str, scale: Expr) -> Layer:
    """The layer in one mode."""
    return Layer(
        name=f"EmbeddingBag{mode.capitalize()}",
        input=x[n, r],
        parameters=(W[k, d],),
        statements=(Statement(y[n, d], scale * Sum(Equal(k, x[n, r]) * W[k, d], r, k)),),
        module="torch.nn.EmbeddingBag",
        when={"mode": mode},
        options={"max_norm": (None,), "scale_grad_by_freq": (False,), "sparse": (False,), "padding_idx": (None,)},
        reasons={"max_norm": "the forward pass changes the table in place", "sparse": "fields are dense tensors"},
        examples=(Example((4,), SIZES | {"mode": mode}, below=5),),
        refused=(Refused((4,), "padding_idx", SIZES | {"mode": mode, "padding_idx": 1}, below=5),),
    )


EMBEDDING_BAG_SUM, EMBEDDING_BAG_MEAN = bag("sum", Integer(1)), bag("mean", 1 / extent(r))
