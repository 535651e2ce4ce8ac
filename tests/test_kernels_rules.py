"""Every kernel of an emitted rule, in Triton's interpreter, against the rule's ATen program: all definitions, all examples."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emitted import lowered_layers
from satchel import extend
from satchel.runtime import triton_launch as launch
from satchel.runtime.record import Record, entries
from satchel.runtime.rules import Rule
from satchel_gen.definitions import Example, Layer
from satchel_gen.lowering.kernels import layer_kernels
from satchel_gen.lowering.plan import extent_symbol
from satchel_gen.lowering.rules import LoweredRule

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run with TRITON_INTERPRET=1")

COLUMNS, ROWS = 2, 5


def cases() -> Iterator[Any]:
    for layer, lowered in lowered_layers():
        rules = [kernel.rule for kernel in layer_kernels(lowered)]
        for k, example in enumerate(layer.examples):
            if rules and not example.below:
                dtypes = (torch.float64, torch.float32) if k == len(layer.examples) - 1 else (torch.float64,)
                yield pytest.param(layer, rules, example, dtypes, id=f"{layer.name}_{k}")


def built(layer: Layer, example: Example) -> nn.Module:
    """The layer in float64, with parameters and buffers that are no constants."""
    module = getattr(nn, layer.module.rpartition(".")[2])(**example.arguments).train(example.training).double()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.3, 1.2)
    return extend(module)


def recorded(module: nn.Module, example: Example) -> Record:
    """One call of the layer."""
    output = module(torch.randn(3, *example.shape, dtype=torch.float64, requires_grad=True) * 1)
    base = output if output._base is None else output._base
    record = entries(output.grad_fn).record or entries(base.grad_fn).record
    assert record is not None
    return record


def explicit(layer: Layer, rule: LoweredRule, record: Record) -> list[Tensor]:
    """Random tensors for what the engine passes."""
    extents = {"V": COLUMNS, "E": ROWS}
    for tensor, sizes in ((layer.input, record.canonical_input), (layer.output, record.canonical_output)):
        assert sizes is not None
        extents |= {str(extent_symbol(i)): size for i, size in zip(tensor.indices, sizes, strict=True)}
    given = []
    for name, axes in rule.arguments.items():
        if name in rule.operands:
            continue
        drawn = torch.randn([extents[str(extent_symbol(i))] for i in axes], dtype=torch.float64)
        given.append(drawn.sign() if name == "sign" else drawn)
    return given


def emitted(record: Record, rule: LoweredRule) -> Rule:
    definition = record.definition
    found = [r for rules in definition.parameters.values() for r in rules.values()]
    found += [
        r
        for name in ("vjp", "diagonal", "mean_vjp", "sandwich", "residual", "hessian")
        if (r := getattr(definition, name))
    ]
    (one,) = [r for r in found if r.kernel == rule.name]
    return one


@pytest.mark.parametrize(("layer", "rules", "example", "dtypes"), list(cases()))
def test_kernels_agree_with_aten(
    layer: Layer, rules: list[LoweredRule], example: Example, dtypes: tuple[torch.dtype, ...]
) -> None:
    torch.manual_seed(0)
    module = built(layer, example)
    record = recorded(module, example)
    kernels = importlib.import_module(f"satchel.kernels.{record.definition.kernels}")
    for lowered in rules:
        rule = emitted(record, lowered)
        for dtype in dtypes:
            values = operands(layer, lowered, record, rule, dtype)
            agrees(getattr(kernels, lowered.name)(*values), rule.aten(*values), lowered.name)


def operands(layer: Layer, lowered: LoweredRule, record: Record, rule: Rule, dtype: torch.dtype) -> list[Any]:
    """The rule's arguments, floating-point tensors as `dtype`."""
    values = [*explicit(layer, lowered, record), *map(record.operand, rule.operands)]
    return [v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def agrees(result: Tensor, expected: Tensor, name: str) -> None:
    tolerance = 1e-12 if result.dtype == torch.float64 else 2e-5
    scale = tolerance * expected.abs().max().item()
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=scale, msg=lambda text: f"{name}: {text}")


def test_a_row_too_long_for_registers_is_left_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    ((layer, of_layer),) = ((layer, lowered) for layer, lowered in lowered_layers() if layer.name == "LayerNorm")
    (lowered,) = (kernel.rule for kernel in layer_kernels(of_layer) if kernel.rule.name == "vjp")
    module = built(layer, layer.examples[0])
    record = recorded(module, layer.examples[0])
    kernels = importlib.import_module("satchel.kernels.layer_norm")
    rule = emitted(record, lowered)
    values = operands(layer, lowered, record, rule, torch.float64)
    assert kernels.resident(launch.RESIDENT, 1, values[0].float())
    assert not kernels.resident(launch.RESIDENT, 1, values[0])
    monkeypatch.setattr(launch, "RESIDENT", 2)
    monkeypatch.setattr(kernels, "vjp_resident", None)
    agrees(kernels.vjp(*values), rule.aten(*values), "vjp")
