"""What a definition is: frozen dataclasses, validated where they are built, with the file and line in every error."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
from sympy import Expr, Indexed, IndexedBase, Symbol

from ..calculus.derive import Statement
from ..notation import Index, IndexSum, LogSumExp, indices, reads, tensors


class DefinitionError(ValueError):
    """A definition that makes no sense; the message starts with its file and line."""


@dataclass(frozen=True)
class Source:
    """Where a definition is written."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def _caller() -> Source:
    """The first frame outside this module: the line of the definition."""
    for frame in inspect.stack()[1:]:
        if frame.filename != __file__ and not frame.filename.startswith("<"):
            return Source(Path(frame.filename), frame.lineno)
    raise AssertionError("a definition is built by a file")


@dataclass(frozen=True)
class Example:
    """A sample for the generic tests: constructor arguments and the shape of one sample (without the batch axis)."""

    shape: tuple[int, ...]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """An input or option that must be refused, with a word that the message must hold."""

    shape: tuple[int, ...]
    mentions: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Categorical:
    """ŷ ~ p over the values of an index; `probabilities` is indexed like the loss's input."""

    probabilities: Expr
    over: Index


@dataclass(frozen=True)
class Normal:
    """ŷ ~ N(mean, variance), elementwise."""

    mean: Expr
    variance: Expr


Distribution = Categorical | Normal


class _Validated:
    """Shared checks of definitions."""

    name: str
    source: Source

    def _fail(self, reason: str) -> None:
        raise DefinitionError(f"{self.source}: {type(self).__name__} {getattr(self, 'name', '')}: {reason}")

    def _check_statements(
        self, statements: tuple[Statement, ...], known: Mapping[str, tuple[Index, ...]], batch: Index
    ) -> None:
        if not statements:
            self._fail("has no statement")
        ranks = {name: len(axes) for name, axes in known.items()}
        for statement in statements:
            if len(set(statement.axes)) != len(statement.axes):
                self._fail(f"an index occurs twice in the target {statement.target}")
            if batch not in statement.axes:
                self._fail(f"{statement.target} has no batch index {batch}; samples must not mix")
            for read in reads(statement.value):
                name = str(read.base)
                if name not in ranks:
                    self._fail(f"{read} in the statement of {statement.target} reads an undeclared tensor {name!r}")
                if len(read.indices) != ranks[name]:
                    self._fail(f"{read} has {len(read.indices)} indices, but {name!r} was declared with {ranks[name]}")
            loose = _free(statement.value) - set(statement.axes)
            if loose:
                names = ", ".join(sorted(map(str, loose)))
                self._fail(f"index {names} is neither summed nor an index of {statement.target}")
            unbound = {s for s in statement.value.free_symbols if not isinstance(s, Index | IndexedBase | Indexed)}
            unbound = {s for s in unbound if str(s) not in ranks}
            if unbound:
                self._fail(
                    f"unbound symbol {', '.join(sorted(map(str, unbound)))} in the statement of {statement.target}"
                )
            if statement.name in ranks:
                self._fail(f"{statement.name!r} is defined twice")
            ranks[statement.name] = len(statement.axes)


def _free(expr: Expr) -> set[Index]:
    if isinstance(expr, IndexSum | LogSumExp):
        return _free(expr.body) - set(expr.over)
    if not expr.args or isinstance(expr, Index):
        return {expr} if isinstance(expr, Index) else set()
    return set().union(*(_free(arg) for arg in expr.args))


@dataclass(frozen=True)
class NodeCall:
    """An autograd node that is a call of a layer although no module was called: `F.linear(x, weight)`.

    name: the node's. input: what it has saved as the layer's input, None if no rule of these parameters reads that.
    parameters: by name, the position among the node's inputs, and the indices of the tensor there.
    options: what else it has saved, with the values that the formula covers.
    """

    name: str
    input: str | None
    parameters: Mapping[str, tuple[int, tuple[Index, ...]]]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Layer(_Validated):
    """A module y = f(x, θ), one statement per named intermediate, the output's last.

    `options` maps attributes of the module to the values that the formula covers; other values are refused by name.
    """

    name: str
    input: Indexed
    statements: tuple[Statement, ...]
    parameters: tuple[Indexed, ...] = ()
    module: str = ""
    options: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    examples: tuple[Example, ...] = (Example((3,)),)
    refused: tuple[Refused, ...] = ()
    approximation: str = "expand"
    nodes: tuple[NodeCall, ...] = ()
    source: Source = dataclasses.field(default_factory=_caller)

    def __post_init__(self) -> None:
        object.__setattr__(self, "module", self.module or f"torch.nn.{self.name}")
        known = {str(t.base): tuple(t.indices) for t in (self.input, *self.parameters)}
        for node in self.nodes:
            for name, (_, axes) in node.parameters.items():
                if name not in known or set(axes) != set(known[name]):
                    self._fail(f"node {node.name}: {name} has indices {known.get(name)}, not {axes}")
        if len(known) != 1 + len(self.parameters):
            self._fail("two tensors share a name")
        batch = self.input.indices[0]
        for parameter in self.parameters:
            if batch in parameter.indices:
                self._fail(f"the parameter {parameter} depends on the batch index {batch}")
        self._check_statements(self.statements, known, batch)
        if self.statements[-1].axes[0] != batch:
            self._fail(f"the output {self.statements[-1].target} must have the batch index {batch} first")

    @property
    def output(self) -> Indexed:
        return self.statements[-1].target

    @property
    def batch(self) -> Index:
        return self.input.indices[0]


@dataclass(frozen=True)
class Composite(_Validated):
    """A module that is made of operations which satchel passes one by one, unless a backend fuses them: `without` names those."""

    name: str
    without: tuple[str, ...]
    module: str = ""
    source: Source = dataclasses.field(default_factory=_caller)

    def __post_init__(self) -> None:
        object.__setattr__(self, "module", self.module or f"torch.nn.{self.name}")
        unknown = set(self.without) - {"mkldnn", "cudnn"}
        if unknown:
            self._fail(f"unknown backends: {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class Loss(_Validated):
    """A negative log-likelihood: its terms ℓ as statements (the last one), and the distribution that it comes from.

    `reduction="mean"` divides by the number of terms. `domain` bounds the target, where it is an integer: [lower, upper).
    """

    name: str
    input: Indexed
    target: Indexed
    statements: tuple[Statement, ...]
    distribution: Distribution
    module: str = ""
    domain: tuple[Expr, Expr] | None = None
    options: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    examples: tuple[Example, ...] = (Example((3,)),)
    refused: tuple[Refused, ...] = ()
    source: Source = dataclasses.field(default_factory=_caller)

    def __post_init__(self) -> None:
        object.__setattr__(self, "module", self.module or f"torch.nn.{self.name}")
        known = {str(t.base): tuple(t.indices) for t in (self.input, self.target)}
        self._check_statements(self.statements, known, self.input.indices[0])

    @property
    def terms(self) -> Indexed:
        return self.statements[-1].target

    @property
    def batch(self) -> Index:
        return self.input.indices[0]


@dataclass(frozen=True)
class Quantity:
    """A named formula over a layer's Jacobians, `name[axes] = value`; features are formulas over quantities."""

    name: str
    axes: tuple[Index, ...]
    value: Expr

    @property
    def symbol(self) -> Symbol:
        return Symbol(self.name, real=True)


@dataclass(frozen=True)
class Feature(_Validated):
    """What `backpack(...)` computes: a formula per field value, over quantities of one or more sources.

    `value` has the units of BackPACK, `table5` those of the cheat sheet's Table 5 (None: `value` · u/N).
    A Kronecker-factored feature gives one tuple of quantities per approximation, output factor first.
    """

    name: str
    field: str
    needs: Mapping[str, tuple[Quantity, ...]]
    value: Expr | Mapping[str, tuple[Quantity, ...]]
    formula: str
    shape: str
    reference: str
    table5: Expr | None = None
    options: tuple[str, ...] = ()
    source: Source = dataclasses.field(default_factory=_caller)

    def __post_init__(self) -> None:
        declared = {q.name for quantities in self.needs.values() for q in quantities}
        if isinstance(self.value, Mapping):
            used = {q.name for factors in self.value.values() for q in factors}
        else:
            used = {str(s) for e in (self.value, self.table5) if e is not None for s in e.free_symbols} - {"N", "u"}
        if used != declared:
            self._fail(f"needs {sorted(declared)} but its formulas use {sorted(used)}")

    @property
    def kronecker(self) -> bool:
        return isinstance(self.value, Mapping)


_n, _j = indices("n j*")
_x, _y = tensors("input output")
#: The argument of an activation: one element of its input.
z: Indexed = _x[_n, _j]


def activation(name: str, value: Expr, **details: Any) -> Layer:
    """An elementwise module y = value(z)."""
    return Layer(name, input=z, statements=(Statement(_y[_n, _j], sympy.sympify(value)),), source=_caller(), **details)
