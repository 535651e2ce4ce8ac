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

from ..calculus.derive import Constant, Statement
from ..calculus.evaluate import moves_the_last
from ..notation import ONE, Access, Equal, Extent, Index, IndexSum, LogSumExp, Option, indices, reads, tensors
from .distributions import Distribution, NoDistribution


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
    """A sample for the generic tests: constructor arguments, the shape of one sample (without the batch axis), the module's mode.

    With `below`, the input is made of integers from 0 up to it.
    """

    shape: tuple[int, ...]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: bool = True
    below: int | None = None


@dataclass(frozen=True)
class Refused:
    """An input or option that must be refused, with a word that the message must hold."""

    shape: tuple[int, ...]
    mentions: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: bool = True
    below: int | None = None


class _Validated:
    """Shared checks of definitions."""

    name: str
    source: Source

    def _default_module(self) -> None:
        object.__setattr__(self, "module", getattr(self, "module", "") or f"torch.nn.{self.name}")

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
            unbound = {s for s in unbound if str(s) not in ranks and not isinstance(s, Option)}
            if unbound:
                self._fail(
                    f"unbound symbol {', '.join(sorted(map(str, unbound)))} in the statement of {statement.target}"
                )
            if statement.name in ranks:
                self._fail(f"{statement.name!r} is defined twice")
            ranks[statement.name] = len(statement.axes)
        for statement in statements:
            if isinstance(statement, Constant) and moves_the_last(statement, statements):
                self._fail(f"{statements[-1].target} depends on {statement.target}, which is no constant")


def _free(expr: Expr) -> set[Index]:
    if isinstance(expr, IndexSum | LogSumExp):
        return _free(expr.body) - set(expr.over)
    if isinstance(expr, Extent):
        return set()
    if isinstance(expr, Access):
        return _free(expr.args[1])
    if not expr.args or isinstance(expr, Index):
        return {expr} if isinstance(expr, Index) else set()
    return set().union(*(_free(arg) for arg in expr.args))


@dataclass(frozen=True)
class NodeCall:
    """An autograd node that is a call of a layer although no module was called: `F.linear(x, weight)`.

    name: the node's. input: what it has saved as the layer's input, and that one's position among the node's inputs; None if no
    rule of these parameters reads it.
    parameters: by name, the position among the node's inputs, and the indices of the tensor there.
    options: what else it has saved, with the values that the formula covers.
    """

    name: str
    input: tuple[str, int] | None
    parameters: Mapping[str, tuple[int, tuple[Index, ...]]]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Layer(_Validated):
    """A module y = f(x, θ), one statement per named intermediate, the output's last.

    `options` maps attributes of the module to the values that the formula covers; other values are refused by name.
    `joined` are indices that torch stores as one axis, the first with the extent in `extents`: ((g, c),), {g: groups}.
    `ranks` gives the number of axes of a starred index where two stand side by side, in options and the tensor's rank `ndim`.
    `buffers` are tensors of the module that are not trained.
    `operation` names the autograd node that the module ends in, where its input and numbers in `saved` are taken from it:
    what the module did before (padding, say) then passes by nodes of its own.
    `when` are attributes that tell definitions of one module apart; `reasons` say why an option is refused, and the remedy.
    A parameter that is absent (None) is 1 where a rule reads it; `absent` gives the value of a number that is None, "precision"
    the machine precision of the output's dtype.
    """

    name: str
    input: Indexed
    statements: tuple[Statement, ...]
    parameters: tuple[Indexed, ...] = ()
    buffers: tuple[Indexed, ...] = ()
    joined: tuple[tuple[Index, ...], ...] = ()
    extents: Mapping[Index, Option | int] = dataclasses.field(default_factory=dict)
    ranks: Mapping[Index, Expr] = dataclasses.field(default_factory=dict)
    module: str = ""
    operation: str = ""
    saved: tuple[str, ...] = ()
    when: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    absent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    examples: tuple[Example, ...] = (Example((3,)),)
    refused: tuple[Refused, ...] = ()
    approximation: str = "expand"
    nodes: tuple[NodeCall, ...] = ()
    source: Source = dataclasses.field(default_factory=_caller)

    def __post_init__(self) -> None:
        self._default_module()
        object.__setattr__(self, "statements", tuple(_accesses(s, self.input) for s in self.statements))
        tensors = (self.input, *self.parameters, *self.buffers)
        known = {str(t.base): tuple(t.indices) for t in tensors}
        for node in self.nodes:
            for name, (_, axes) in node.parameters.items():
                if name not in known or set(axes) != set(known[name]):
                    self._fail(f"node {node.name}: {name} has indices {known.get(name)}, not {axes}")
        if len(known) != len(tensors):
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

    @property
    def windowed(self) -> bool:
        """Whether the input is read at positions that are affine in several indices."""
        return any(s.value.has(Access) for s in self.statements)

    @property
    def of_integers(self) -> bool:
        """Whether the input is made of indices."""
        compared = {arg for s in self.statements for equal in s.value.atoms(Equal) for arg in equal.args}
        return any(isinstance(arg, Indexed) and arg.base == self.input.base for arg in compared)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Attributes of the module that the formulas read."""
        expressions = (
            *(s.value for s in self.statements),
            *map(sympy.sympify, self.extents.values()),
            *self.ranks.values(),
        )
        return tuple(sorted({o.attribute for e in expressions for o in e.atoms(Option)}))


def _accesses(statement: Statement, tensor: Indexed) -> Statement:
    """Positions of `tensor` that are not plain indices, as accesses to its own axes; the place is an index of the target."""

    def access(axis: Index, position: Expr) -> Expr:
        if isinstance(position, Index):
            return position
        places = [i for i in statement.axes if i in position.atoms(Index)]
        return Access(axis, position, *places[:1])

    found = [read for read in statement.reads(str(tensor.base)) if len(read.indices) == len(tensor.indices)]
    names = {read: read.base[tuple(map(access, tensor.indices, read.indices))] for read in found}
    return dataclasses.replace(statement, value=statement.value.xreplace(names))


@dataclass(frozen=True)
class Passing(_Validated):
    """A module without parameters that is linear in its input, piecewise at least: torch's own backward passes every factor.

    `formula` says what it computes; no rule is derived from it.
    """

    name: str
    formula: str
    module: str = ""
    examples: tuple[Example, ...] = (Example((3,)),)
    refused: tuple[Refused, ...] = ()
    source: Source = dataclasses.field(default_factory=_caller)

    def __post_init__(self) -> None:
        self._default_module()


@dataclass(frozen=True)
class Composite(_Validated):
    """A module that is made of operations which satchel passes one by one, unless a backend fuses them: `without` names those."""

    name: str
    without: tuple[str, ...]
    module: str = ""
    source: Source = dataclasses.field(default_factory=_caller)

    def __post_init__(self) -> None:
        self._default_module()
        unknown = set(self.without) - {"mkldnn", "cudnn"}
        if unknown:
            self._fail(f"unknown backends: {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class Classes:
    """Targets are integers 0 ≤ y < extent of `over`, or the number `ignored`, which counts for nothing."""

    over: Index
    ignored: Expr


@dataclass(frozen=True)
class Loss(_Validated):
    """A loss: its terms ℓ(f, y) as statements (the last one), up to what the input does not move, and where it comes from.

    Where ℓ is `weight` times the negative log-likelihood of a `distribution`, the weight may depend on the target.
    `operands` are further tensors: attributes of the module of that name, or where `arguments` says so the arguments of its
    forward function. One with the input's axes is broadcast to them; one that is absent (None) is 1.
    `reductions` gives what Σℓ is divided by; "mean": by default the number of terms.
    `support` is where the input lies, `domain` where the target does (for checks and tests; torch refuses other classes).
    `when` are attributes that tell variants of one module apart; a target made of classes does so by itself.
    """

    name: str
    input: Indexed
    target: Indexed
    statements: tuple[Statement, ...]
    distribution: Distribution | NoDistribution
    weight: Expr = ONE
    operands: tuple[Indexed, ...] = ()
    arguments: tuple[str, ...] = ()
    module: str = ""
    reductions: Mapping[str, Expr] = dataclasses.field(default_factory=dict)
    support: sympy.Set = sympy.S.Reals
    domain: sympy.Set | Classes = sympy.S.Reals
    when: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    examples: tuple[Example, ...] = (Example((3,)),)
    refused: tuple[Refused, ...] = ()
    source: Source = dataclasses.field(default_factory=_caller)

    def __post_init__(self) -> None:
        self._default_module()
        known = {str(t.base): tuple(t.indices) for t in (self.input, self.target, *self.operands)}
        self._check_statements(self.statements, known, self.input.indices[0])
        count = sympy.Mul(*(Extent(i) for i in self.terms.indices))
        object.__setattr__(self, "reductions", {"mean": count, "sum": sympy.Integer(1), **self.reductions})

    @property
    def terms(self) -> Indexed:
        return self.statements[-1].target

    @property
    def batch(self) -> Index:
        return self.input.indices[0]

    @property
    def outcomes(self) -> tuple[Index, ...]:
        """The axes of a target that is drawn."""
        drawn = self.distribution
        return drawn.axes(tuple(self.input.indices)) if isinstance(drawn, Distribution) else ()


@dataclass(frozen=True)
class Quantity:
    """A named formula over a layer's Jacobians, `name[axes] = value`; features are formulas over quantities.

    A `matrix`, or one per block, has the axes of each index group as one.
    """

    name: str
    axes: tuple[Index, ...]
    value: Expr
    matrix: bool = False

    @property
    def symbol(self) -> Symbol:
        return Symbol(self.name, real=True)


@dataclass(frozen=True)
class Feature(_Validated):
    """What `backpack(...)` computes: a formula per field value, over quantities of one or more sources.

    `value` has the units of BackPACK, `table5` those of the cheat sheet's Table 5 (None: `value` · u/N).
    A Kronecker-factored feature gives one tuple of quantities per approximation, output factor first, and the `block` that a
    parameter without Kronecker structure gets instead.
    """

    name: str
    field: str
    needs: Mapping[str, tuple[Quantity, ...]]
    value: Expr | Mapping[str, tuple[Quantity, ...]]
    formula: str
    shape: str
    reference: str
    table5: Expr | None = None
    block: Quantity | None = None
    options: tuple[str, ...] = ()
    source: Source = dataclasses.field(default_factory=_caller)

    def __post_init__(self) -> None:
        declared = {q.name for quantities in self.needs.values() for q in quantities}
        if isinstance(self.value, Mapping):
            used = {q.name for factors in self.value.values() for q in factors}
            used |= {self.block.name} if self.block is not None else set()
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
