"""What the contexts of definitions' templates share: frozen records of strings and numbers, every statement printed before rendering."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..definitions.model import Feature, Layer, Loss
from ..definitions.operation import Operation
from ..formula import wrapped
from ..lowering.plan import Axes

AxisNames = tuple[str | tuple[str, ...], ...]


@dataclass(frozen=True)
class RuleContext:
    function: str
    operands: tuple[str, ...]
    kernel: str | None
    lead: int | None = None
    writes: bool = False
    heavy: bool = False
    composed: bool = False


class Stated:
    """What is defined by formulas, one per statement."""

    formulas: tuple[str, ...]

    @property
    def formula(self) -> str:
        return "\n".join(map(wrapped, self.formulas))

    @property
    def formula_literal(self) -> str:
        """A string literal, one line per statement."""
        *before, last = self.formulas
        return " ".join([*(repr(f"{line}; ") for line in before), repr(last)])


def snake(name: str) -> str:
    """CrossEntropyLoss → cross_entropy_loss."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def module_name(definition: Layer | Loss | Feature | Operation) -> str:
    """Its file's own name where the definition's begins with that; a file may hold several."""
    stem, name = definition.source.file.stem, definition.name
    spelled = len(stem.replace("_", ""))
    if stem.replace("_", "") != name[:spelled].lower():
        return snake(name)
    rest = snake(name[spelled:])
    return f"{stem}_{rest}" if rest[:1].isalpha() else stem + rest


def axis_names(axes: Axes) -> tuple[str, ...]:
    return tuple(f"{i.name}*" if i.many else i.name for i in axes)


def table(layers: tuple[Layer, ...], losses: tuple[Loss, ...]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """File and constant of every definition, for the registry."""
    named = [
        [{"name": d.name, "file": module_name(d), "constant": module_name(d).upper()} for d in group]
        for group in (layers, losses)
    ]
    return named[0], named[1]
