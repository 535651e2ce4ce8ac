"""Layers that no module has: what is found in their parameters' Jacobians, and that every program computes what its formula means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from satchel.extensions.reductions import REDUCTIONS
from satchel.runtime import cost
from satchel_gen.calculus.evaluate import evaluate
from satchel_gen.calculus.instantiate import Instance
from satchel_gen.definitions import Layer, Statement, Sum, indices, tensors
from satchel_gen.definitions import quantities as Q
from satchel_gen.emit.functions import rule_functions
from satchel_gen.emit.triton import environment
from satchel_gen.lowering.rules import LoweredRule, lower_layer

n, r, g, o, i, j = indices("n r* g o i j")
x, y, W, w, b = tensors("input output weight scale bias")
GROUPED = Layer(
    "Grouped",
    input=x[n, r, g, i],
    parameters=(W[g, o, i], b[g, o]),
    statements=(Statement(y[n, r, g, o], Sum(W[g, o, i] * x[n, r, g, i], i) + b[g, o]),),
)
DEPTHWISE = Layer(
    "Depthwise",
    input=x[n, r, g, i],
    parameters=(W[g, i],),
    statements=(Statement(y[n, r, g], Sum(W[g, i] * x[n, r, g, i], i)),),
)
MERGED = Layer(
    "Merged",
    input=x[n, r, g, i],
    parameters=(W[o, g, i],),
    statements=(Statement(y[n, r, o], Sum(W[o, g, i] * x[n, r, g, i], g, i)),),
)
SCALE = Layer("Scale", input=x[n, r, j], parameters=(w[j],), statements=(Statement(y[n, r, j], w[j] * x[n, r, j]),))
RAW = Layer("Raw", input=x[n, j], parameters=(w[j],), statements=(Statement(y[n, j], w[j] + x[n, j]),))
LAYERS = (GROUPED, DEPTHWISE, MERGED, SCALE, RAW)
STRUCTURES = {
    "Grouped.weight": ("r", "g", "o", "i"),
    "Grouped.bias": ("r", "", "go", ""),
    "Depthwise.weight": ("r", "g", "", "i"),
    "Merged.weight": ("r", "", "o", "gi"),
    "Scale.scale": None,
    "Raw.scale": ("", "", "j", ""),
}
MANY = {"v": 2, "n": 5, "r": 3, "g": 2, "o": 4, "i": 3, "j": 4, "e": 2}
ONE = MANY | {"v": 1, "r": 1}


def named(layer: Layer) -> dict[str, Instance]:
    return {f"{layer.name}.{parameter.base}": Instance(layer, parameter) for parameter in layer.parameters}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_structure_follows_from_the_formula(layer: Layer) -> None:
    """Shared, block, outer and inner axes; a parameter that has nothing but block axes has no Kronecker structure."""
    for name, instance in named(layer).items():
        found = instance.structure
        groups = found and (found.shared, found.block, found.outer, found.inner)
        letters = groups and tuple("".join(axis.name[0] for axis in group) for group in groups)
        assert letters == STRUCTURES[name]


RULES = [(layer, rule) for layer in LAYERS for rule in lower_layer(layer).rules]


def emitted(layer: Layer, rule: LoweredRule) -> dict[str, Any]:
    """The rule's functions, run as they are printed, after those of the pullbacks that it may reduce."""
    template = environment().from_string('{% from "functions.jinja" import function %}{{ function(f) }}')
    imports = environment().from_string('{% from "functions.jinja" import imports %}{{ imports() }}')
    known: dict[str, Any] = {"__package__": "satchel.layers"}
    exec(imports.render(), known)
    pull = lower_layer(layer).parameters.get(rule.name.removesuffix(f"_{rule.quantity}"), {}).get("per_sample")
    for one in [rule] if pull is None else [pull, rule]:
        for function in rule_functions(one):
            exec(template.render(f=function), known)
    return known


def draw(rule: LoweredRule, extents: dict[str, int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: [extents[axis.name[0]] for axis in axes] for name, axes in rule.arguments.items()}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("extents", [MANY, ONE], ids=["many", "one"])
@pytest.mark.parametrize("layer,rule", RULES, ids=[f"{layer.name}-{rule.name}" for layer, rule in RULES])
def test_programs_compute_their_formula(
    layer: Layer, rule: LoweredRule, extents: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against NumPy, index by index; a matrix has the axes of each group as one."""
    monkeypatch.setattr(cost, "machine", cost.Machine(cache_elements=8))  # several blocks
    arguments = draw(rule, extents)
    formula = rule.formula
    values = {name: value.numpy() for name, value in arguments.items()}
    expected = evaluate(formula.terms, formula.axes, values, extents)
    if formula.groups:
        expected = expected.reshape([int(np.prod([extents[a.name[0]] for a in group])) for group in formula.groups])
    function = emitted(layer, rule)[rule.name]
    for variant in rule.variants:
        if all(extents[axis.name[0]] == 1 for axis in variant.unit):
            with cost.forced(variant.name):
                np.testing.assert_allclose(function(*arguments.values()).numpy(), expected, rtol=1e-10, atol=1e-12)


# --- what the formulas mean, against the dense curvature of one parameter ------------------------------------------


def quantities(layer: Layer, parameter: str, arguments: dict[str, torch.Tensor], *names: str) -> list[torch.Tensor]:
    rules = lower_layer(layer).parameters[parameter]
    found = []
    for name in names:
        rule = rules[name]
        found.append(emitted(layer, rule)[rule.name](*(arguments[argument] for argument in rule.arguments)))
    return found


SHARED = [
    (layer, parameter, rule)
    for layer in (GROUPED, DEPTHWISE, MERGED, SCALE)
    for parameter, rules in lower_layer(layer).parameters.items()
    for rule in rules.values()
    if rule.quantity != "averaged_factor"  # of pairs
]


@pytest.mark.parametrize("layer,parameter,rule", SHARED, ids=[f"{layer.name}-{rule.name}" for layer, _, rule in SHARED])
def test_positions_of_several_uses_are_those_of_one(layer: Layer, parameter: str, rule: LoweredRule) -> None:
    """Each quantity of all positions, from totals of what is additive over two parts of them."""
    whole = draw(rule, MANY)
    reduction = REDUCTIONS.get(rule.quantity)
    of = lower_layer(layer).parameters[parameter][reduction.of if reduction else rule.quantity]
    total: Any = 0
    for start, length in ((0, 1), (1, MANY["r"] - 1)):
        part = {name: whole[name] for name in of.arguments}
        for name, axes in of.arguments.items():
            if r in axes:
                part[name] = part[name].narrow(axes.index(r), start, length)
        total = total + emitted(layer, of)[of.name](*part.values())
    if reduction is not None:
        more = [MANY["r"]] if reduction.positions else [whole["sign"]] if "sign" in whole else []
        total = reduction.function(total, *more)
    torch.testing.assert_close(total, emitted(layer, rule)[rule.name](*whole.values()))


def test_blocks_of_a_grouped_layer() -> None:
    """At one position of one sample B_g ⊗ A_g is the curvature itself, between the weights of one group."""
    extents = ONE | {"n": 1}
    rules = lower_layer(GROUPED).parameters["weight"]
    arguments = draw(rules["per_sample"], extents | {"v": 3})
    per_sample, B, A = quantities(
        GROUPED, "weight", arguments, "per_sample", "output_factor_expand", "input_factor_expand"
    )
    assert B.shape == (2, 4, 4) and A.shape == (2, 3, 3)
    dense = torch.einsum("vngoi,vnhpj->goihpj", per_sample, per_sample)
    for group in range(2):
        block = dense[group, :, :, group].reshape(12, 12)
        torch.testing.assert_close(torch.kron(B[group], A[group]), block)


def test_averaged_factor_of_a_grouped_layer_is_that_of_the_output() -> None:
    """KFRA starts at Σ s sᵀ: with it, its factor is KFLR's with positions summed."""
    rules = lower_layer(GROUPED).parameters["weight"]
    arguments = draw(rules["per_sample"], MANY)
    s = arguments["factor"]
    arguments["averaged"] = torch.einsum("vnrgo,vnqhp->rgoqhp", s, s)
    averaged, reduced = quantities(GROUPED, "weight", arguments, "averaged_factor", "output_factor_reduce")
    torch.testing.assert_close(averaged, reduced)


@pytest.mark.parametrize("extents", [MANY, ONE], ids=["many", "one"])
def test_block_of_a_scale_is_the_curvature(extents: dict[str, int]) -> None:
    rules = lower_layer(SCALE).parameters["scale"]
    arguments = draw(rules["per_sample"], extents)
    T, block = quantities(SCALE, "scale", arguments, "per_sample", "block")
    torch.testing.assert_close(block, torch.einsum("vnp,vnq->pq", T, T))


def test_every_parameter_has_one_kind_of_curvature() -> None:
    """Kronecker factors or the block, so that KFAC, KFLR and KFRA have a value for each."""
    for layer in LAYERS:
        for name, rules in lower_layer(layer).parameters.items():
            kinds = {Q.BLOCK.name}, {quantity.name for quantity in Q.OUTPUT_FACTORS}
            assert [kind <= rules.keys() for kind in kinds].count(True) == 1, (layer.name, name)
