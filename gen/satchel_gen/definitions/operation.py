"""What an operation is that autograd knows as one node: a formula of several inputs, from which the node's derivatives follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sympy import Expr, Indexed

from ..calculus.derive import Statement
from ..notation import Index, Option
from .model import Layer, Source, _caller, _Validated


@dataclass(frozen=True)
class OperationNode:
    """An autograd node by name. saved: under which name it has saved a tensor or number, where that is not the formula's.

    options: what else it has saved, with the values that the formula covers.
    """

    name: str
    saved: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Operation(_Validated):
    """y = f(inputs; operands), one statement per named intermediate, the output's last. `inputs` are in the node's order.

    `operands` are further tensors, broadcast to their axes; one that is absent (None) is 0. `joined` are indices that torch stores
    as one axis, all but one of which are axes of other inputs. `absent` gives a number that is None, in extents.
    """

    name: str
    inputs: tuple[Indexed, ...]
    statements: tuple[Statement, ...]
    nodes: tuple[OperationNode, ...]
    operands: tuple[Indexed, ...] = ()
    joined: tuple[tuple[Index, ...], ...] = ()
    absent: Mapping[Option, Expr] = dataclasses.field(default_factory=dict)
    source: Source = dataclasses.field(default_factory=_caller)

    def __post_init__(self) -> None:
        known = {str(t.base): tuple(t.indices) for t in (*self.inputs, *self.operands)}
        if len(known) != len(self.inputs) + len(self.operands):
            self._fail("two tensors share a name")
        self._check_statements(self.statements, known, self.inputs[0].indices[0])

    @property
    def output(self) -> Indexed:
        return self.statements[-1].target

    @property
    def widest(self) -> Indexed:
        """The intermediate of most axes: what a column takes."""
        return max((s.target for s in self.statements), key=lambda target: len(target.indices))

    def of(self, tensor: Indexed) -> Layer:
        """As a function of one input."""
        others = tuple(other for other in (*self.inputs, *self.operands) if other != tensor)
        return Layer(self.name, tensor, self.statements, buffers=others, joined=self.joined, source=self.source)
