"""Autograd nodes that are operations with a definition: their second derivatives by its rules, from what the node has saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .axes import Axes, canonical_shape, names
from .errors import NodeFailed
from .rules import Operation, OperationNode, registry
from .settings import current
from .torch_private import saved


@dataclass(frozen=True)
class Applied:
    """One call of an operation: its tensors, canonical, numbers, and the extents of all axes."""

    operation: Operation
    shapes: Mapping[str, tuple[int, ...]]
    operands: Mapping[str, Any]
    extents: Mapping[str, int]

    def hessian(self, position: int, delta: Tensor, tangents: Mapping[int, Tensor]) -> Tensor:
        """δ [*output], v [V, *input] by position, zero where absent → Σ_y δ_y ∂²y/∂x∂x′ v [V, *input]."""
        inputs, count = list(self.operation.inputs), len(next(iter(tangents.values())))
        name = inputs[position]
        rule = self.operation.hessian.get(name)
        if rule is None:
            return delta.new_zeros(count, *self.shapes[name])
        each = prod(self.extents[axis] for axis in self.operation.widest) * delta.element_size()
        size = max(1, current().step_bytes // max(1, each))
        along: dict[str, tuple[Tensor, ...]] = {}
        for number, (other, axes) in enumerate(self.operation.inputs.items()):
            tangent = tangents.get(number)
            tangent = delta.new_zeros(count, *self.shapes[other]) if tangent is None else tangent
            along[f"tangent_{other}"] = self._canonical(tangent, axes, 1).split(size)
        first = self._canonical(delta, self.operation.output, 0)
        found = []
        for some in zip(*along.values(), strict=True):
            operands = {**self.operands, **dict(zip(along, some, strict=True))}
            found.append(rule.aten(first, *(operands[operand] for operand in rule.operands)))
        return torch.cat(found).reshape(count, *self.shapes[name])

    def _canonical(self, tensor: Tensor, axes: Axes, lead: int) -> Tensor:
        return tensor.reshape(*tensor.shape[:lead], *(self.extents[axis] for axis in names(axes)))


def applied(node: Node, positions: Iterable[int]) -> Applied | None:
    """The call that a node is, if a definition covers it, and all inputs at these positions: a mask may be learned."""
    operation, entry = registry().by_node.get(node.name(), (None, None))
    if operation is None or entry is None or max(positions, default=0) >= len(operation.inputs):
        return None
    try:
        if any(saved(node, option) != value for option, value in entry.options.items()):
            return None
        tensors = {name: saved(node, entry.saved.get(name, name)) for name in operation.inputs}
        return _applied(node, operation, entry, tensors)
    except RuntimeError as error:  # freed, or changed in place
        raise NodeFailed(node.name()) from error


def _applied(node: Node, operation: Operation, entry: OperationNode, tensors: Mapping[str, Tensor]) -> Applied | None:
    extents: dict[str, int] = {}
    for name, axes in operation.inputs.items():  # a joined axis is known by the other inputs
        plain = [axis for axis in axes if isinstance(axis, str)]
        if len(axes) != tensors[name].ndim:
            return None
        extents |= {axis: size for axis, size in zip(axes, tensors[name].shape, strict=True) if axis in plain}
    operands: dict[str, Any] = {}
    for name, axes in operation.inputs.items():
        shape = canonical_shape(axes, tensors[name].shape, extents)
        if shape is None:
            return None
        extents |= dict(zip(names(axes), shape, strict=True))
        operands[name] = tensors[name].reshape(shape)
    like = next(iter(tensors.values()))
    for name, axes in operation.operands.items():
        found = saved(node, entry.saved.get(name, name))
        tensor = like.new_zeros(()) if found is None else found
        stored = [prod(extents[part] for part in (axis if isinstance(axis, tuple) else (axis,))) for axis in axes]
        operands[name] = tensor.expand(stored).reshape([extents[axis] for axis in names(axes)])
    for name in {operand for rule in operation.hessian.values() for operand in rule.operands} - operands.keys():
        if name.startswith("tangent_"):
            continue
        value = saved(node, entry.saved.get(name, name))
        operands[name] = operation.absent[name](extents) if value is None else value
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Applied(operation, shapes, operands, extents)
