"""The programs of squared sums: all agree, and each is chosen where it is predicted to be cheapest."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from emitted import lowered_layers
from satchel.extensions.reductions import REDUCTIONS
from satchel.runtime import cost
from satchel_gen.emit.contexts import module_name
from satchel_gen.lowering.rules import LoweredRule

#: Of tensors alone: windows, masks and numbers of a module are drawn with a module, in test_layers.
CHOICES: list[tuple[str, LoweredRule]] = [
    (module_name(layer), rule)
    for layer, lowered in lowered_layers()
    if not layer.windowed and not layer.of_integers and not layer.numbers and not layer.joined
    for rule in lowered.rules
    if len(rule.variants) > 1
]
IDS = [f"{layer}-{rule.name}" for layer, rule in CHOICES]
SHAPES = [
    {"V": 1, "N": 3, "R": 1, "O": 4, "I": 5}, {"V": 2, "N": 5, "R": 7, "O": 3, "I": 4}, {"V": 3, "N": 1, "R": 2, "O": 1, "I": 6},
    {"V": 2, "N": 9, "R": 3, "O": 8, "I": 2},
]  # fmt: skip


def operands(rule: LoweredRule, extents: dict[str, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = {"C": "I", "S": "R", "J": "O"}  # other layers' letters
    shapes = [[extents[names.get(i.name.upper(), i.name.upper())] for i in axes] for axes in rule.arguments.values()]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def emitted(layer: str, name: str):
    return getattr(importlib.import_module(f"satchel.layers.{layer}"), name)


@pytest.mark.parametrize("extents", SHAPES, ids=str)
@pytest.mark.parametrize("layer,rule", CHOICES, ids=IDS)
def test_all_programs_agree_with_the_stored_pullback(layer, rule, extents, monkeypatch):
    monkeypatch.setattr(cost, "machine", cost.Machine(cache_elements=16))  # several blocks even at these shapes
    factor, *others = operands(rule, extents)
    weights = others[: "sign" in rule.arguments]
    pullbacks = emitted(layer, f"{rule.name.removesuffix(rule.quantity)}per_sample")(factor, *others[len(weights) :])
    reference = REDUCTIONS[rule.quantity].function(pullbacks, *weights)
    with cost.recorded() as choices:
        programs = emitted(layer, rule.name).ranked(factor, *others)
    assert choices == [tuple(programs)]
    assert {program.name for program in programs} == {
        variant.name
        for variant in rule.variants
        if all(extents[i.name.upper()] == 1 for i in variant.unit)
        and not (variant.several and all(extents[i.name.upper()] == 1 for i in variant.several))
    }
    for program in programs:
        with cost.forced(program.name):
            found = emitted(layer, rule.name)(factor, *others)
        torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)


#: Where each program must win: by far the fewest operations, or the least memory.
EXPECTED = {
    "separated": {"V": 1, "N": 256, "R": 1, "O": 256, "I": 512},
    "centred": {"V": 1, "N": 256, "R": 1, "O": 256, "I": 512},
    "blockwise": {"V": 1, "N": 128, "R": 512, "O": 64, "I": 64},
    "gram": {"V": 1, "N": 64, "R": 4, "O": 512, "I": 512},
}


@pytest.mark.parametrize("program", EXPECTED)
@pytest.mark.parametrize("layer,rule", CHOICES, ids=IDS)
def test_each_program_is_chosen_where_it_is_cheapest(layer, rule, program):
    if program not in {variant.name for variant in rule.variants}:
        pytest.skip(f"{rule.name} has no {program} program: not all of its axes are summed")
    shapes = [[EXPECTED[program][i.name.upper()] for i in axes] for axes in rule.arguments.values()]
    chosen, *_ = emitted(layer, rule.name).ranked(*(torch.empty(shape, device="meta") for shape in shapes))
    assert chosen.name == program


@pytest.mark.parametrize(
    "columns,samples,each",
    [
        (1, 1, 1),
        (3, 5, 7),
        (2, 9, 10**9),
        (4, 3, 1 << 16),
        (2, 9, 1 << 16),
        (9, 3, 1 << 17),
        (9, 3, 1 << 19),
        (0, 3, 7),
    ],
)
def test_blocks_cover_every_column_and_sample_once(columns, samples, each):
    seen = torch.zeros(columns, samples)
    parts = list(cost.blocks(columns, samples, each))
    for c, s in parts:
        caches = 4 if seen[c, s].shape[0] > 1 and seen[c, s].shape[1] == 1 else 1
        assert seen[c, s].numel() * each <= max(caches * cost.machine.cache_elements, each)
        seen[c, s] += 1
    assert (seen == 1).all() and len(parts) == cost.block_count(columns, samples, each)


def test_what_is_kept_and_exceeds_the_cache_by_little_is_one_block():
    each = cost.machine.cache_elements // 10
    assert list(cost.blocks(1, 12, each, kept=True)) == [(slice(0, 1), slice(0, 12))]
    assert [s.stop - s.start for _, s in cost.blocks(1, 12, each)] == [6, 6]  # of one length
    assert len(list(cost.blocks(1, 21, each, kept=True))) == cost.block_count(1, 21, each) == 3


def test_counts_are_what_the_shapes_say():
    """2·(columns · samples · positions · outputs · inputs) for the stored product, and its square."""
    _, rule = next(c for c in CHOICES if c[1].name.endswith("sum_of_squares") and "signed" not in c[1].name)
    variant = next(v for v in rule.variants if v.name == "blockwise")
    extents = {"V": 2, "N": 3, "R": 5, "O": 7, "I": 11}
    value = variant.flops.subs({s: extents[s.name] for s in variant.flops.free_symbols})
    assert value == 2 * math.prod(extents.values()) + 2 * 2 * 3 * 7 * 11


@pytest.mark.parametrize(
    "told,elements",
    [("3072K\n", 3 << 18), ("512K\n", 1 << 19), ("65536K\n", 1 << 20), ("?", 1 << 19), (None, 1 << 19)],
)
def test_blocks_are_as_large_as_the_cache_of_a_core(told, elements, monkeypatch, tmp_path):
    if told is not None:
        (tmp_path / "size").write_text(told)
    monkeypatch.setattr(cost, "_CACHE", tmp_path / "size")
    assert cost.Machine().cache_elements == elements
