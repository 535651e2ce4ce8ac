"""Every kind of node passes columns as autograd passes one column at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import Node

from satchel.runtime.passing import pull
from satchel.runtime.plan import Step
from satchel.runtime.sweep import add, take


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x)
        return x * x, 3 * y

    @staticmethod
    def backward(ctx, g, h):
        (x,) = ctx.saved_tensors
        return 2 * x * g, 3 * h


def inplace_part(x):
    y = x * 1
    y[:, :2].mul_(3)
    y[:, 1:].relu_()
    return y


X = (4, 6)
OPS = {
    "add": lambda x: x + x,
    "broadcast": lambda x: x + x[:, :1] * x[:1, :1],
    "mul": lambda x: x * torch.sin(x),
    "cat": lambda x: torch.cat([x, 2 * x, x], 1),
    "stack": lambda x: torch.stack([x, x * x], 1),
    "unbind": lambda x: x.unbind(1)[1] * x.unbind(1)[4],
    "chunk": lambda x: x.chunk(3, 1)[1] + x.chunk(3, 1)[0],
    "split_partial": lambda x: torch.split(x, [1, 5], 1)[1],
    "expand": lambda x: x[:, :, None].expand(4, 6, 3),
    "repeat": lambda x: x.repeat(1, 2),
    "slice": lambda x: x[:, ::2],
    "index": lambda x: x[:, torch.tensor([0, 0, 3])],
    "gather": lambda x: x.gather(1, torch.tensor([[0, 1]] * 4)),
    "masked": lambda x: x.masked_fill(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "permute": lambda x: x.reshape(4, 2, 3).permute(0, 2, 1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "mean": lambda x: x.mean(1),
    "var": lambda x: x.var(1),
    "norm": lambda x: x.norm(dim=1),
    "prod": lambda x: x.prod(1),
    "max": lambda x: x.max(1)[0],
    "amax": lambda x: x.amax(1),
    "cumsum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort(1)[0],
    "topk": lambda x: x.topk(2, 1)[0],
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky": F.leaky_relu,
    "elu": F.elu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "pow": lambda x: x**3,
    "abs": torch.abs,
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": lambda x: F.instance_norm(x.reshape(4, 2, 3)),
    "rms": lambda x: F.rms_norm(x, (6,)),
    "conv1d": lambda x: F.conv1d(x.reshape(4, 2, 3), torch.ones(3, 2, 2)),
    "conv2d": lambda x: F.conv2d(x.reshape(4, 1, 2, 3), torch.randn(2, 1, 2, 2)),
    "conv_t": lambda x: F.conv_transpose1d(x.reshape(4, 2, 3), torch.randn(2, 3, 2)),
    "max_pool": lambda x: F.max_pool1d(x.reshape(4, 2, 3), 2),
    "max_pool2d": lambda x: F.max_pool2d(x.reshape(4, 1, 2, 3), 2),
    "avg_pool": lambda x: F.avg_pool2d(x.reshape(4, 1, 2, 3), 2),
    "adaptive": lambda x: F.adaptive_avg_pool1d(x.reshape(4, 2, 3), 2),
    "unfold": lambda x: F.unfold(x.reshape(4, 1, 2, 3), 2),
    "tensor_unfold": lambda x: x.unfold(1, 3, 1),
    "pad": lambda x: F.pad(x, (1, 2)),
    "reflect": lambda x: F.pad(x, (1, 2), mode="reflect"),
    "roll": lambda x: x.roll(1, 1),
    "interpolate": lambda x: F.interpolate(x.reshape(4, 2, 3), scale_factor=2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x[:, :4].reshape(4, 4, 1, 1), 2),
    "matmul": lambda x: x @ torch.randn(6, 3),
    "bmm": lambda x: x.reshape(4, 2, 3) @ x.reshape(4, 3, 2),
    "einsum": lambda x: torch.einsum("ni,nj->nij", x, x),
    "linear": lambda x: F.linear(x, torch.randn(3, 6)),
    "sdpa": lambda x: F.scaled_dot_product_attention(
        x.reshape(4, 1, 2, 3), x.reshape(4, 1, 2, 3), x.reshape(4, 1, 2, 3)
    ),
    "cdist": lambda x: torch.cdist(x.reshape(4, 2, 3), torch.ones(4, 2, 3) * 2),
    "custom": lambda x: Square.apply(x, x)[0],
    "custom_two": lambda x: sum(Square.apply(x, x)),
    "dropout": lambda x: F.dropout(x, 0.5),
    "inplace_part": inplace_part,
    "inplace_mul": lambda x: (x * 1).mul_(2).tanh_(),
    "as_strided": lambda x: (x * 1).as_strided((4, 3), (6, 2)),
    "bilinear": lambda x: F.bilinear(x, x, torch.randn(2, 6, 6)),
    "normalize": lambda x: F.normalize(x, dim=1),
    "cosine": lambda x: F.cosine_similarity(x[:, :3], x[:, 3:]),
    "tril": lambda x: (x[:, :, None] * x[:, None]).tril(),
    "diag_embed": lambda x: torch.diag_embed(x),
    "flip": lambda x: x.flip(1),
    "glu": lambda x: F.glu(x),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.2])),
    "to": lambda x: x.float().double(),
    "scatter": lambda x: torch.zeros(4, 8, dtype=x.dtype).scatter_add(1, torch.arange(6).expand(4, 6), x),
    "fft": lambda x: torch.fft.irfft(torch.fft.rfft(x)),
    "lstm_cell": lambda x: torch.sigmoid(x[:, :3]) * torch.tanh(x[:, 3:]),
    "gru": lambda x: _gru(x),
    "index_put": lambda x: x.index_put((torch.arange(4), torch.zeros(4).long()), torch.ones(4)),
}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _gru(x):
    torch.manual_seed(1)
    return nn.GRU(3, 2, batch_first=True).requires_grad_(False)(x.reshape(4, 2, 3))[0]


@pytest.mark.parametrize("name", OPS)
def test_columns(name):
    torch.manual_seed(5)
    leaf = torch.randn(X, requires_grad=True)
    x = leaf * 1  # the node whose input is wanted
    y = OPS[name](x)
    columns = torch.randn(3, *y.shape).to(y.dtype)
    live = {(y.grad_fn, y.output_nr): columns}
    for step in _steps(y.grad_fn, x.grad_fn):
        arrived = take(live, step)
        if arrived:
            add(live, pull(step, arrived))
    (found,) = [passed for (node, _), passed in live.items() if node is x.grad_fn]
    expected = torch.stack([torch.autograd.grad(y, x, column, retain_graph=True)[0] for column in columns])
    rtol = 1e-5 if name == "to" else 1e-7  # "to" goes through float32
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-9)


def _steps(start: Node, end: Node) -> list[Step]:
    """The nodes on the way, consumers first: what a walk plans where a parameter lies below `end`."""
    steps, reached = [], {end}
    for node in [node for node in _in_order(start) if node is not end]:
        following = enumerate(node.next_functions)
        inputs = tuple((k, (below, number)) for k, (below, number) in following if below in reached)
        if inputs:
            reached.add(node)
            steps.append(Step(node, None, inputs))
    return steps[::-1]


def _in_order(start: Node) -> list[Node]:
    """Each node after all that lie below it."""
    order: dict[Node, None] = {}

    def visit(node: Node | None) -> None:
        if node is not None and node not in order:
            for below, _ in node.next_functions:
                visit(below)
            order[node] = None

    visit(start)
    return list(order)
