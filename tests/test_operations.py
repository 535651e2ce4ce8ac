"""Operations that autograd knows as one node: their second derivatives from a definition, beside autograd's of a form that it can
differentiate twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import satchel
from conftest import DEFINITIONS, GPU
from satchel.registry import REGISTRY
from satchel.runtime.operations import applied
from satchel.runtime.plan import Step
from satchel.runtime.second import second_derivative
from satchel_gen.definitions import DefinitionError, Operation, OperationNode, Statement

N, H, T, S, D = 2, 4, 3, 5, 8
LOWEST = torch.finfo(torch.float64).min


def mask(*shape: int, value: float = -torch.inf) -> Tensor:
    """With a query that may see nothing, and one that may see all."""
    found = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found[..., 1:, ::2] = value
    found[..., -1, :] = value
    return found


#: Arguments, heads of keys and values, positions of queries.
CALLS: dict[str, tuple[dict[str, Any], int, int]] = {
    "plain": ({}, H, T),
    "one query": ({}, H, 1),
    "scaled": ({"scale": 0.3}, H, T),
    "causal": ({"is_causal": True}, H, T),
    "causal, more queries": ({"is_causal": True}, H, S + 2),
    "of booleans": ({"attn_mask": mask(T, S) > 0}, H, T),
    "of numbers": ({"attn_mask": mask(T, S)}, H, T),
    "of a head": ({"attn_mask": mask(1, H, T, S)}, H, T),
    "of a sample": ({"attn_mask": mask(N, 1, T, S)}, H, T),
    "lowest": ({"attn_mask": mask(T, S, value=LOWEST)}, H, T),
    "grouped": ({"enable_gqa": True}, 2, T),
    "grouped, causal": ({"enable_gqa": True, "is_causal": True, "scale": 0.7}, 1, T),
}
BACKENDS = [
    ("cpu", torch.float64, SDPBackend.FLASH_ATTENTION),
    ("cpu", torch.float32, SDPBackend.FLASH_ATTENTION),
    *([("cuda", torch.float32, SDPBackend.EFFICIENT_ATTENTION), ("cuda", torch.float16, SDPBackend.FLASH_ATTENTION),
       ("cuda", torch.float16, SDPBackend.CUDNN_ATTENTION)] if GPU else []),
]  # fmt: skip
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2}


def inputs(heads: int, queries: int, samples: int = N) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(samples, H, queries, D), (samples, heads, S, D), (samples, heads, S, D)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def placed(value: Any, device: str, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bool:
        return value.to(device)
    return torch.where(value.isinf(), value, value.clamp(min=torch.finfo(dtype).min)).to(device, dtype)


def attend(tensors: list[Tensor], options: dict[str, Any], backend: SDPBackend) -> tuple[Tensor, Step]:
    """The output and its node, as a plan has it where something wanted lies below each input."""
    leaves = [x.detach().requires_grad_() * 1 for x in tensors]
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(*leaves, **options)
    assert y.grad_fn is not None
    following = enumerate(y.grad_fn.next_functions)
    return y, Step(y.grad_fn, None, tuple((k, (below, nr)) for k, (below, nr) in following if below is not None))


def near(value: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = (value.double().cpu() - wanted).abs().max()
    assert error <= tolerance * wanted.abs().max().clamp(min=1.0), error


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: f"{b[0]}-{b[1]}-{b[2].name}".replace("torch.", ""))
@pytest.mark.parametrize("name", CALLS)
def test_attention(name: str, backend: tuple[str, torch.dtype, SDPBackend], limit: int | None) -> None:
    """Σ δ ∂²y of tangents at all inputs together."""
    device, dtype, kernel = backend
    options, heads, queries = CALLS[name]
    tensors = inputs(heads, queries)
    move = partial(placed, device=device, dtype=dtype)
    try:
        _, step = attend([move(x) for x in tensors], {key: move(value) for key, value in options.items()}, kernel)
    except RuntimeError as error:
        pytest.skip(str(error))
    if applied(step.node, ()) is None:
        pytest.skip(f"{step.name}: torch has not taken the kernel")
    plain = [x.detach().requires_grad_() for x in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        y = F.scaled_dot_product_attention(*plain, **options)
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    tangents = [torch.randn(3, *x.shape, generator=generator, dtype=torch.float64) for x in tensors]
    edges = [edge for _, edge in step.inputs]
    with satchel.settings(memory_limit=limit):
        derivative = second_derivative(step, {0: move(delta)})
        assert derivative is not None
        second = derivative({edge: move(v) for edge, v in zip(edges, tangents, strict=True)})
    slopes = torch.autograd.grad(y, plain, delta, create_graph=True)
    for k, edge in enumerate(edges):
        along = [
            torch.autograd.grad(slopes, plain[k], [t[v] for t in tangents], retain_graph=True)[0] for v in range(3)
        ]
        near(second[edge], torch.stack(along), TOLERANCE[dtype])


class Saved:
    """What a node has saved."""

    def __init__(self, name: str, **values: Any) -> None:
        self._name = name
        for key, value in values.items():
            setattr(self, f"_saved_{key}", value)

    def name(self) -> str:
        return self._name


@pytest.mark.parametrize("node", [node.name for operation in REGISTRY.operations for node in operation.nodes])
def test_what_the_formula_does_not_cover(node: str) -> None:
    """Which weights were dropped is not known; a mask is no input."""
    query, key, value = inputs(H, T)
    found: Callable[..., Any] = partial(Saved, node, query=query, key=key, value=value, is_causal=False, scale=None)
    assert applied(found(dropout_p=0.0), [0, 2]) is not None
    assert applied(found(dropout_p=0.0), [0, 3]) is None
    assert applied(found(dropout_p=0.5), [0]) is None
    assert applied(found(dropout_p=0.0, query=query[0]), [0]) is None


def test_scale_is_that_of_torch() -> None:
    query, key, value = inputs(H, T)
    _, step = attend([query, key, value], {}, SDPBackend.FLASH_ATTENTION)
    operation = applied(step.node, [0])
    assert operation is not None and operation.operands["scale"] == pytest.approx(D**-0.5)


def test_definition_is_validated() -> None:
    (attention,) = [o for o in DEFINITIONS.operations if o.name == "ScaledDotProductAttention"]
    with pytest.raises(DefinitionError, match="share a name"):
        Operation("Twice", attention.inputs[:1] * 2, attention.statements, (OperationNode("Node"),))
    (x, *_) = attention.inputs
    with pytest.raises(DefinitionError, match="undeclared"):
        Operation("Loose", (x,), (Statement(attention.output, attention.inputs[1]),), (OperationNode("Node"),))
