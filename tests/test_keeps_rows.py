"""Nodes that the probe does not ask: each of them takes entries of the first axis one by one, whenever it is said to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from satchel.runtime.torch_private import ROWWISE, keeps_rows, node_outputs

N = 3


def positive(*shape):
    return (torch.rand(*shape) + 0.5).requires_grad_()


ELEMENTWISE = {
    name: getattr(space, name)
    for space, names in (
        (torch, "abs alias_copy clone exp expm1 log log1p neg reciprocal relu rsqrt sigmoid sqrt tanh"),
        (F, "elu gelu hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish silu softplus softshrink"),
    )
    for name in names.split()
}
#: What makes a node, of a tensor [N, N, N, N]: axes that cannot be told apart by their extents.
SQUARE = {
    **ELEMENTWISE,
    "add": lambda x: x + x,
    "alias": lambda x: torch.ops.aten.alias(x),
    "add_lower_rank": lambda x: x + x[0],
    "sub": lambda x: x - 2 * x,
    "rsub": lambda x: 2.0 - x,
    "mul": lambda x: x * x,
    "mul_lower_rank": lambda x: x * x[1],
    "div": lambda x: x / (x + 1),
    "div_number": lambda x: x / 2,
    "pow": lambda x: x**3,
    "pow_tensor": lambda x: x ** (x + 1),
    "threshold": lambda x: F.threshold(x, 0.6, 0.0),
    "to": lambda x: x.to(torch.bfloat16),
    "dropout": lambda x: F.dropout(x, 0.3),
    "native_dropout": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "bmm": lambda x: torch.bmm(x[0], x[1]),
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 5, -1),
    "expand_in_front": lambda x: x.expand(N, N, N, N, N),
    **{f"cat{k}": lambda x, k=k: torch.cat([x, x], k) for k in (0, 1, -1, -4)},
    **{f"softmax{k}": lambda x, k=k: x.softmax(k) for k in (0, 2, -1, -4)},
    **{f"log_softmax{k}": lambda x, k=k: x.log_softmax(k) for k in (0, 2, -1, -4)},
    **{f"permute{k}": lambda x, k=k: x.permute(k) for k in ((0, 2, 1, 3), (1, 0, 2, 3), (-4, 3, 2, 1), (-1, 1, 2, 0))},
    **{f"transpose{k}": lambda x, k=k: x.transpose(*k) for k in ((1, 2), (0, 1), (-1, 2), (-4, -1))},
    "t": lambda x: x[0, 0].t(),
    **{f"select{k}": lambda x, k=k: x.select(k, 1) for k in (0, 1, -1, -4)},
    **{f"slice{k}": lambda x, k=k: x.narrow(k, 0, 2) for k in (0, 1, -1, -4)},
    **{f"split{k}": lambda x, k=k: x.split(2, k)[0] for k in (0, 1, -1, -4)},
    **{f"unsafe_split{k}": lambda x, k=k: torch.unsafe_split(x, 2, k)[0] for k in (0, 1, -1, -4)},
    **{f"split_sizes{k}": lambda x, k=k: x.split([1, 2], k)[1] for k in (0, 1, -1, -4)},
    **{f"unbind{k}": lambda x, k=k: x.unbind(k)[1] for k in (0, 1, -1, -4)},
    **{f"unsqueeze{k}": lambda x, k=k: x.unsqueeze(k) for k in (0, 1, -1, -5)},
    **{f"squeeze{k}": lambda x, k=k: x[:, :1].squeeze(k) for k in (1, -3)},
    **{f"mean{k}": lambda x, k=k: x.mean(k) for k in ((0,), (2, 3), (-1, -4), (1,))},
    **{f"sum{k}": lambda x, k=k: x.sum(k) for k in ((0,), (2, 3), (-1, -4), (1,))},
    "average": lambda x: F.avg_pool2d(x, 2),
    "average3d": lambda x: F.avg_pool3d(x, 2),
    "adaptive_average": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive_average3d": lambda x: F.adaptive_avg_pool3d(x, 2),
    "max": lambda x: F.max_pool2d(x, 2),
    "max3d": lambda x: F.max_pool3d(x, 2),
    "adaptive_max": lambda x: F.adaptive_max_pool2d(x, 2),
    "adaptive_max3d": lambda x: F.adaptive_max_pool3d(x, 2),
    **{f"reflect{k}": lambda x, k=k: F.pad(x if k > 1 else x[0], (1, 1) * k, "reflect") for k in (1, 2, 3)},
    **{f"replicate{k}": lambda x, k=k: F.pad(x if k > 1 else x[0], (1, 1) * k, "replicate") for k in (1, 2, 3)},
    **{
        f"upsample_{mode}{k}": lambda x, k=k, mode=mode: F.interpolate((x[0], x, x[None])[k - 1], scale_factor=2, mode=mode)
        for mode, ranks in (("nearest", (1, 2, 3)), ("linear", (1,)), ("bilinear", (2,)), ("bicubic", (2,)), ("trilinear", (3,)))
        for k in ranks
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SQUARE)
def test_rows_stay_apart(name):
    """A column on one row reaches nothing but that row of the inputs of a node that keeps rows."""
    y = SQUARE[name](positive(N, N, N, N))
    node = y.grad_fn
    for position, (below, number) in enumerate(node.next_functions):
        if below is None:
            continue
        before = node_outputs(below)[number][0]
        if not keeps_rows(node, before, y.shape):
            continue
        for row in range(y.shape[0]):
            column = torch.zeros_like(y)
            column[row] = torch.linspace(0.5, 1.5, column[row].numel()).reshape(column[row].shape)
            passed = node(*(column if k == y.output_nr else None for k in range(len(node_outputs(node)))))
            found = passed[position] if isinstance(passed, tuple) else passed
            rows = found.reshape(y.shape[0], -1).count_nonzero(1).nonzero().flatten().tolist()
            assert found.shape == before and rows in ([row], [])


def test_every_name_is_seen_to_keep_rows():
    """Otherwise the table could hold a name that the test above never meets."""
    seen = set()
    for make in SQUARE.values():
        y = make(positive(N, N, N, N))
        edges = [edge for edge in y.grad_fn.next_functions if edge[0] is not None]
        if any(keeps_rows(y.grad_fn, node_outputs(below)[number][0], y.shape) for below, number in edges):
            seen.add(y.grad_fn.name())
    assert seen == ROWWISE
