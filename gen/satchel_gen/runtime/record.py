"""What a forward pass leaves in `grad_fn.metadata`: its life is the graph's, nothing is stored on modules.

A record holds weak references to the module and its parameters, and only the tensors that its rules read. It holds no tensor
that is attached to its own node or one downstream, so there is no cycle.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

from torch import Tensor, nn
from torch.autograd.graph import Node

from .axes import Batch, canonical, extents
from .axes import names as axis_names
from .errors import BatchAxisLost, GraphFreed, Overwritten
from .geometry import Geometry
from .lazy import lazy
from .rules import Layer, Loss
from .torch_private import metadata, version

Edge: TypeAlias = tuple[Node, int]

_KEY = __name__


@dataclass(eq=False)
class Mark:
    """A module without a definition, or one that returned its input and so has no node of its own."""

    name: str
    module: weakref.ref[nn.Module]

    #: Whether the node is the module's own, and the module is known to be piecewise linear.
    linear: bool = field(default=False, kw_only=True)

    @property
    def where(self) -> str:
        """How errors call the module."""
        module = self.module()
        return f"layer {self.name or '(root)'!r} ({type(module).__name__ if module is not None else 'deleted'})"


@dataclass(eq=False, kw_only=True)
class _Kept(Mark):
    """A module with a definition: the tensors that its rules read, with their versions."""

    options: dict[str, Any]
    node_shape: tuple[int, ...]
    output_nr: int
    edge: Edge | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    freed: bool = False
    #: Whether autograd may be asked only once for what it has saved.
    checkpointed: bool = False

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The edge, if it leads somewhere."""
        return () if self.edge is None else (self.edge,)

    def keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.tensors[name], self.versions[name] = tensor, version(tensor)

    def release(self) -> None:
        """Drop the tensors, when autograd drops those that it saved."""
        self.tensors.clear()
        self.freed = True

    def tensor(self, name: str) -> Tensor:
        if self.freed:
            raise GraphFreed(self.where)
        tensor = self.tensors.get(name)  # absent where the operation itself overwrote it
        if tensor is None or version(tensor) != self.versions[name]:
            raise Overwritten(self.where, name)
        return tensor


@dataclass(eq=False, kw_only=True)
class Record(_Kept):
    """One call of a layer. Its node receives the gradient of the output, reshaped to `node_shape`; `edge` leads to the input.

    Which axis is the batch is known once a walk has come from the loss: until then it is taken to be the first.
    """

    definition: Layer
    parameters: dict[str, weakref.ref[Tensor]] = field(default_factory=dict)
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    #: Whether the parameter is the transpose of what the definition says.
    transposed: bool = False

    @lazy
    def geometry(self) -> Geometry:
        shape = self.output_shape
        return Geometry(self.definition, self.options, self.input_shape, shape, Batch(shape[0] if shape else 0))

    @property
    def batch(self) -> Batch:
        return self.geometry.batch

    @property
    def samples(self) -> int:
        return self.geometry.batch.samples

    def place(self, batch: Batch) -> None:
        """Say where the batch is; refuse where the layer's input or output cannot have it there."""
        self.geometry = self.geometry.at(batch)
        if self.geometry.misplaced is not None:
            raise BatchAxisLost(self.where, self.geometry.misplaced, batch.samples)

    @property
    def canonical_input(self) -> tuple[int, ...]:
        """Canonical shape of the input."""
        return self.geometry.canonical_input or self._refuse(self.input_shape)

    @property
    def canonical_output(self) -> tuple[int, ...]:
        """Canonical shape of the output."""
        return self.geometry.canonical_output or self._refuse(self.output_shape)

    def _refuse(self, shape: tuple[int, ...]) -> NoReturn:
        raise BatchAxisLost(self.where, shape, self.samples)

    def at_output(self, tensor: Tensor, lead: int) -> Tensor:
        """A factor [*lead, *node] as the layer's canonical output."""
        own = tensor.shape
        if self.geometry.is_first:
            canonical = self.canonical_output
            return tensor if own[lead:] == canonical else tensor.reshape(*own[:lead], *canonical)
        return self.batch.to_front(tensor.reshape(*own[:lead], *self.output_shape), self.geometry.output_layout, lead)

    def column(self, delta: Tensor) -> Tensor:
        """δ [*output] as one column of the canonical output."""
        if self.geometry.is_first:
            return delta.reshape(1, *self.canonical_output)
        return self.at_output(delta[None], lead=1)

    def at_input(self, tensor: Tensor, lead: int) -> Tensor:
        """The layer's canonical input [*lead, *canonical] as it is [*lead, *input]."""
        return self.batch.to_place(tensor, self.input_shape, lead)

    def parameter(self, name: str) -> Tensor:
        parameter = self.parameters[name]()
        if parameter is None:
            raise GraphFreed(self.where)
        if version(parameter) != self.versions[name]:
            raise Overwritten(self.where, f"parameter {name!r}")
        return parameter

    def operand(self, name: str) -> Any:
        """An operand of a rule, canonical."""
        if name == "input":
            tensor, geometry = self.tensor("input"), self.geometry
            if geometry.is_first_of_input:
                shape = self.canonical_input
                return tensor if tensor.shape == shape else tensor.reshape(shape)
            return geometry.batch.to_front(tensor, geometry.input_layout)
        if name == "output":
            return self.batch.to_front(self.tensor("output"), self.geometry.output_layout)
        if name.endswith("_shape"):
            return self._shape(name.removesuffix("_shape"))
        if name in self.definition.parameters:
            return self._canonical_parameter(name)
        return self.tensor(name) if name in self.definition.buffers else self.options[name]

    def _shape(self, name: str) -> tuple[int, ...]:
        """Canonical shape of the input, the output or a parameter."""
        if name in self.definition.parameters:
            return self.parameter_shape(name)
        return self.canonical_input if name == "input" else self.canonical_output

    def parameter_shape(self, name: str) -> tuple[int, ...]:
        """Canonical shape of a parameter, as the definition has its axes."""
        axes = self.definition.parameter_axes[name]
        if name not in self.parameters:
            sizes = extents(self.definition.input_axes, self.canonical_input)
            return tuple([sizes[axis.rstrip("*")] for axis in axis_names(axes)])
        own = tuple(self._as_defined(name).shape)
        return self.geometry.layout(axes, own).canonical_shape(own) or own

    def _canonical_parameter(self, name: str) -> Tensor:
        shape = self.parameter_shape(name)
        if name not in self.parameters:  # absent: 1 wherever it stands
            return self.tensors["one"].expand(shape)
        parameter = self._as_defined(name)
        return parameter if parameter.shape == shape else parameter.reshape(shape)

    def _as_defined(self, name: str) -> Tensor:
        parameter = self.parameter(name)
        return parameter.mT if self.transposed else parameter

    def called(self, parameter: str) -> str:
        """What its module calls a parameter of the definition."""
        return parameter

    def may_change(self, operand: str) -> bool:
        """Whether an operand is a tensor, or the shape of a parameter, that the user may overwrite or free."""
        return self._is_kept(operand) or operand.removesuffix("_shape") in self.parameters

    def touch(self, operand: str) -> None:
        """Refuse one of these that was overwritten or freed."""
        if self._is_kept(operand):
            self.tensor(operand)
        else:
            self.parameter(operand.removesuffix("_shape"))

    def _is_kept(self, operand: str) -> bool:
        return operand in ("input", "output") or operand in self.definition.buffers

    @property
    def structure(self) -> tuple[Hashable, ...]:
        """What of the call does not depend on values."""
        shapes = (self.node_shape, self.input_shape, self.output_shape)
        present = tuple(self.parameters)  # wanted or not: rules read them
        return (self.definition, *shapes, self.output_nr, self.checkpointed, present, *self.options.items())

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that autograd computes a gradient for."""
        found = {}
        for name, reference in self.parameters.items():
            parameter = reference()
            if parameter is not None and parameter.requires_grad:
                found[name] = parameter
        return found


@dataclass(eq=False, kw_only=True)
class LossRecord(_Kept):
    """One call of a loss."""

    definition: Loss
    input_shape: tuple[int, ...] = ()
    direct: bool = True  # whether `edge` is the input's own, not that of a tensor that the input is a view of
    differentiated: list[str] = field(default_factory=list)  # what else requires a gradient

    @property
    def where(self) -> str:
        return super().where.replace("layer", "loss", 1).replace("'(root)' ", "")

    def operand(self, name: str) -> Any:
        """An operand of a rule, canonical."""
        if name == "input":
            return canonical(self.tensor("input"), self.definition.input_axes)
        if name == "target":
            return canonical(self.tensor("target"), self.definition.target_axes)
        if name in self.definition.operands:
            return self._broadcast(name, self.definition.operands[name])
        return self.options[name]

    def _broadcast(self, name: str, axes: tuple[str, ...]) -> Tensor:
        """A tensor over all of its axes; 1 where it is absent."""
        x, inputs = self.tensor("input"), self.definition.input_axes
        tensor = self.tensor(name) if name in self.tensors else x.new_ones(())
        if axes == inputs:
            return canonical(tensor.expand(x.shape), inputs)
        sizes = extents(inputs, self.operand("input").shape)
        return tensor.expand([sizes[axis] for axis in axes])


Entry: TypeAlias = Mark | Record | LossRecord


class Entries(list[Entry]):
    """What forward passes left on a node; later entries belong to modules further out."""

    #: The call of a layer whose output the node computes.
    record: Record | None = None
    losses: tuple[LossRecord, ...] = ()


_NOTHING = Entries()


def entries(node: Node) -> Entries:
    found: Entries = metadata(node).get(_KEY, _NOTHING)
    return found


def attach(node: Node, entry: Entry) -> Entries:
    """Leave `entry` on `node`; all that is there now."""
    present: Entries | None = metadata(node).get(_KEY)
    if present is None:
        present = metadata(node)[_KEY] = Entries()
    present.append(entry)
    if isinstance(entry, Record):
        if present.record is None:
            present.record = entry
    elif isinstance(entry, LossRecord):
        present.losses += (entry,)
    return present


def alias(tensor: Tensor) -> Tensor:
    """The same memory without the graph; shares the version counter."""
    return tensor.detach()
