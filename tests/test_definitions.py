"""Definitions: found by their files, validated where they are written."""

from __future__ import annotations

import pytest

from satchel_gen.definitions import Constant, DefinitionError, Feature, Layer, Statement, Sum, indices, load, tensors
from satchel_gen.definitions.quantities import PER_SAMPLE, SUM_OF_SQUARES

n, i, o, k = indices("n i o k")
x, y, W, u = tensors("input output weight u")


def test_every_file_defines_something():
    definitions = load()
    assert all(group for group in (definitions.layers, definitions.losses, definitions.features))
    for definition in (*definitions.layers, *definitions.losses, *definitions.features):
        assert definition.source.file.is_file()


def test_only_refuses_unknown_names():
    with pytest.raises(DefinitionError, match=r"Linaer.*Linear"):
        load().only({"Linaer"})


@pytest.mark.parametrize(
    "value,message",
    [
        (Sum(W[o, i] * x[n, i], i) + u[o], "undeclared tensor 'u'"),
        (Sum(W[o] * x[n, i], i), "declared with 2"),
        (W[o, i] * x[n, i], "index i is neither summed nor an index of"),
        (Sum(W[o, i] * x[n, i], i) * k, "index k is neither"),
    ],
)
def test_a_wrong_layer_names_its_file_and_line(value, message):
    with pytest.raises(DefinitionError, match=rf"test_definitions\.py:\d+: Layer Wrong: .*{message}"):
        Layer("Wrong", input=x[n, i], parameters=(W[o, i],), statements=(Statement(y[n, o], value),))


def test_a_parameter_cannot_depend_on_the_sample():
    with pytest.raises(DefinitionError, match="depends on the batch index n"):
        Layer("Wrong", input=x[n, i], parameters=(W[n, i],), statements=(Statement(y[n, i], x[n, i]),))


def test_what_the_output_depends_on_is_no_constant():
    shifted = Constant(u[n], Sum(x[n, i], i)), Statement(y[n, i], x[n, i] - u[n])
    with pytest.raises(DefinitionError, match=r"output\[n, i\] depends on u\[n\], which is no constant"):
        Layer("Wrong", input=x[n, i], statements=shifted)


def test_a_feature_must_use_what_it_needs():
    with pytest.raises(DefinitionError, match="but its formulas use"):
        Feature(
            "Wrong",
            "wrong",
            {"gradient": (SUM_OF_SQUARES, PER_SAMPLE)},
            PER_SAMPLE.symbol,
            formula="",
            shape="",
            reference="",
        )


def test_definitions_hold_no_derivative_and_no_code():
    """What a contributor writes is mathematics: short files without strings of code."""
    for definition in load().layers:
        text = definition.source.file.read_text()
        assert "diff(" not in text and "torch." not in text.split('"""')[2].replace('="torch.nn.', "")
        families = sum(other.source.file == definition.source.file for other in load().layers)
        assert len(text.splitlines()) <= 40 + 3 * (families - 1)
