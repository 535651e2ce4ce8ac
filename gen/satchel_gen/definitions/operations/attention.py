"""torch.nn.functional.scaled_dot_product_attention, where a fused kernel computes it."""

from sympy import Float, Max, exp, sqrt

from satchel_gen.definitions import (
    After,
    LogSumExp,
    Operation,
    OperationNode,
    Statement,
    Sum,
    extent,
    finite,
    indices,
    options,
    tensors,
)  # fmt: skip

#: Queries t, keys s, d features of both; e of values. The heads of the queries are h groups of g, each with a head of keys.
n, h, g, t, s, d, e = indices("n h g t s d e")
q, k, v, mask, y, scores, lse, weights = tensors("query key value mask output scores lse weights")
scale, causal = options("scale is_causal")
#: What −∞ in a mask counts as, lest a query without any key be not a number: its output is 0.
LOWEST = Float(-1e30)
ATTENTION = Operation(
    name="ScaledDotProductAttention",
    inputs=(q[n, h, g, t, d], k[n, h, s, d], v[n, h, s, e]),
    operands=(mask[n, h, g, t, s],),
    joined=((h, g),),
    statements=(
        Statement(
            scores[n, h, g, t, s],
            scale * Sum(q[n, h, g, t, d] * k[n, h, s, d], d)
            + Max(mask[n, h, g, t, s], LOWEST)
            + causal * LOWEST * After(s, t),
        ),
        Statement(lse[n, h, g, t], LogSumExp(scores[n, h, g, t, s], s)),
        Statement(weights[n, h, g, t, s], exp(scores[n, h, g, t, s] - lse[n, h, g, t])),
        Statement(y[n, h, g, t, e], Sum(finite(mask[n, h, g, t, s]) * weights[n, h, g, t, s] * v[n, h, s, e], s)),
    ),
    absent={scale: 1 / sqrt(extent(d))},
    nodes=(
        OperationNode("ScaledDotProductFlashAttentionForCpuBackward0", {"mask": "attn_mask"}, {"dropout_p": 0.0}),
        OperationNode("ScaledDotProductFlashAttentionBackward0", {}, {"dropout_p": 0.0}),
        OperationNode("ScaledDotProductEfficientAttentionBackward0", {"mask": "attn_bias"}, {"dropout_p": 0.0}),
        OperationNode("ScaledDotProductCudnnAttentionBackward0", {"mask": "attn_bias"}, {"dropout_p": 0.0}),
    ),
)
