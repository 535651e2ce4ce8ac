"""All layers and losses, lowered once for the tests that ask, and the programs of their Triton kernels."""

from __future__ import annotations

from functools import cache

from satchel_gen.definitions import Layer, load
from satchel_gen.emit.contexts import module_name
from satchel_gen.emit.dispatch import layer_programs
from satchel_gen.lowering.kernels import layer_kernels, loss_kernels
from satchel_gen.lowering.losses import lower_loss
from satchel_gen.lowering.programs import Program
from satchel_gen.lowering.rules import LoweredLayer, lower_layer


@cache
def lowered_layers() -> list[tuple[Layer, LoweredLayer]]:
    return [(layer, lower_layer(layer)) for layer in load().layers]


@cache
def emitted_programs() -> list[tuple[str, Program]]:
    """The programs of all emitted kernels, with the modules that hold them."""
    of_layers = [(layer, layer_programs(layer_kernels(lowered))[0]) for layer, lowered in lowered_layers()]
    of_losses = [(loss, loss_kernels(lower_loss(loss))) for loss in load().losses]
    return [(module_name(d), program) for d, programs in (*of_layers, *of_losses) for program in programs]
