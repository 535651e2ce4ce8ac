"""The forward hook that `extend` adds: it leaves a record on the node that computes a module's output."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from .backward import arrive
from .record import Edge, Entry, LossRecord, Mark, Record, alias, attach
from .rules import Layer, Loss, registry
from .torch_private import (
    inside_checkpoint,
    inside_functorch,
    is_accumulator,
    saved,
    version,
    view_base,
)

_recording = True


class disable:
    """Inside `with disable():` forward passes leave no records."""

    def __enter__(self) -> None:
        global _recording
        self._before, _recording = _recording, False

    def __exit__(self, *exception: object) -> None:
        global _recording
        _recording = self._before


def is_recording() -> bool:
    """Whether a forward pass leaves records."""
    return _recording and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not inside_functorch()


@cache
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a method's arguments, without `self`."""
    return tuple(inspect.signature(forward).parameters)[1:]


class Recorder:
    """Forward hook of one module. Holds the module's dotted name only, so modules stay picklable and copyable."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not is_recording():
            return
        definition = registry().definition(module)  # looked up here: a lazy module changes its class after `extend`
        reference = weakref.ref(module)
        if isinstance(output, Tensor) and output.requires_grad:
            if isinstance(definition, Layer) and _plain_parameters(module, definition):
                return self._layer(definition, module, reference, args[0] if args else kwargs["input"], output)
            if isinstance(definition, Loss):
                names = _arguments(type(module).forward)
                given = dict(zip(names, args, strict=False)) | kwargs
                return self._loss(module, {name: given[name] for name in names if name in given}, output)
        if registry().is_piecewise_linear(module) and isinstance(output, Tensor):
            own = list(_between(output, args[0] if args else kwargs["input"]))
            for node in own:
                _attach(node, Mark(self.name, reference, linear=True))
            if own:
                return
        tensors = (output,) if isinstance(output, Tensor) else _tensors(output)
        for own_node in dict.fromkeys([tensor.grad_fn for tensor in tensors]):
            if own_node is not None:
                _attach(own_node, Mark(self.name, reference))

    def _layer(
        self, layer: Layer, module: nn.Module, reference: weakref.ref[nn.Module], x: Tensor, output: Tensor
    ) -> None:
        inplace = vars(module).get("inplace") is True
        if output is x and not inplace:  # Identity, Flatten of two axes: no node of its own
            if output.grad_fn is not None:
                _attach(output.grad_fn, Mark(self.name, reference))
            return
        base = view_base(output) if inplace else None
        if base is not None and _whole_view(output) is None:
            # A part, or a permutation, of another tensor changes: the base's node passes that by its own backward.
            _attach(_node(base), Mark(self.name, reference))
            return
        own = not layer.operation or _node(output).name() == layer.operation
        fits = own or len(layer.output_axes) == output.dim()
        if (inplace and "input" in layer.reads(())) or (fits and not own):
            # What the rules read is gone, or unknown: the module's own nodes pass a factor.
            _attach(_node(output), Mark(self.name, reference))
            return
        if layer.operation and own:
            holder, edge = output, _first_edge(_node(output))
            x = saved(_node(output), "input") if edge is None or "input" in layer.reads(tuple(layer.parameters)) else x
        else:
            holder, edge = _place(x, output, inplace)
        node = _node(holder)
        parameters: dict[str, weakref.ref[Tensor]] = {}
        versions, trainable = {}, []
        for name in layer.parameters:
            parameter = module._parameters[name]
            if parameter is not None:
                parameters[name], versions[name] = weakref.ref(parameter), version(parameter)
                if parameter.requires_grad:
                    trainable.append(name)
        record = Record(
            name=self.name,
            module=reference,
            options=_numbers(module, layer, node, output) if layer.options or layer.numbers else {},
            node_shape=tuple(holder.shape),
            output_nr=holder.output_nr,
            edge=edge,
            versions=versions,
            definition=layer,
            parameters=parameters,
            input_shape=tuple(x.shape),
            output_shape=tuple(output.shape),
            checkpointed=inside_checkpoint(),
        )
        reads = layer.reads(tuple(trainable))
        if "input" in reads and not inplace:
            # Attached where a field can be differentiated; autograd has saved the same tensor then.
            record.keep(input=x if trainable else alias(x))
        if "output" in reads:
            record.keep(output=alias(output))
        if len(parameters) < len(layer.parameters):  # one that is absent is 1 where a rule reads it
            record.keep(one=output.new_ones(()))
        for name in layer.buffers:
            if (buffer := module._buffers[name]) is not None:
                record.keep(**{name: buffer})
        _attach(node, record)

    def _loss(self, module: nn.Module, arguments: Mapping[str, Any], output: Tensor) -> None:
        x, target, *_ = arguments.values()
        loss, node = registry().loss(module, target), _node(output)
        operands = {name: _argument_over(x, arguments[name]) for name in loss.arguments}
        attributes = {name: getattr(module, name) for name in loss.operands if name not in loss.arguments}
        operands |= {name: value for name, value in attributes.items() if value is not None}
        wanted = dict.fromkeys(["reduction", *loss.options, *loss.numbers])
        record = LossRecord(
            name=self.name,
            module=weakref.ref(module),
            options={name: getattr(module, name) for name in wanted},
            node_shape=tuple(output.shape),
            output_nr=output.output_nr,
            edge=(edge := _edge(x)),
            definition=loss,
            input_shape=tuple(x.shape),
            checkpointed=inside_checkpoint(),
            direct=edge is None or edge == (x.grad_fn, x.output_nr),
            differentiated=[name for name, t in {"target": target, **operands}.items() if t.requires_grad],
        )
        record.keep(input=alias(x), target=alias(target), **{name: alias(t) for name, t in operands.items()})
        _attach(node, record)


def _attach(node: Node, entry: Entry) -> None:
    present = attach(node, entry)
    if len(present) == 1:
        node.register_prehook(partial(arrive, present))  # which holds the entries, not the node


def _argument_over(x: Tensor, value: Any) -> Tensor:
    """A number as a tensor; a tensor that only lacks the last axis of `x` with that axis, as torch takes a variance."""
    tensor = value if isinstance(value, Tensor) else x.new_tensor(value)
    return tensor.unsqueeze(-1) if 0 < tensor.ndim < x.ndim and tensor.shape == x.shape[:-1] else tensor


def _plain_parameters(module: nn.Module, layer: Layer) -> bool:
    """Whether the parameters are leaves of the module: parametrised or swapped ones belong to other nodes."""
    own = module._parameters
    for name in layer.parameters:  # noqa: SIM110 (a generator takes twice as long)
        if name not in own or ((parameter := own[name]) is not None and not parameter.is_leaf):
            return False
    return True


def _numbers(module: nn.Module, layer: Layer, node: Node, output: Tensor) -> dict[str, Any]:
    """The attributes of the module that the definition restricts or reads; those of its operation where that has them."""
    wanted = dict.fromkeys([*layer.options, *layer.numbers])
    found = {name: saved(node, name) if name in layer.saved else getattr(module, name) for name in wanted}
    ranks = [len(value) for name, value in found.items() if name in layer.saved and isinstance(value, tuple | list)]
    for name in layer.saved:  # padding="valid" is kept as one number for all axes
        if isinstance(found[name], tuple | list) and len(found[name]) == 1:
            found[name] = tuple(found[name]) * max(ranks)
    for name, value in layer.absent.items():
        if found[name] is None:
            found[name] = torch.finfo(output.dtype).eps if value == "precision" else value
    return found


def _between(output: Tensor, x: Tensor) -> Iterator[Node]:
    """The nodes from an output to its input, where they form a chain."""
    node = output.grad_fn
    while node is not None and node is not x.grad_fn and not is_accumulator(node):
        yield node
        following = [below for below, _ in node.next_functions if below is not None]
        node = following[0] if len(following) == 1 else None


def _first_edge(node: Node) -> Edge | None:
    below, output_nr = node.next_functions[0]
    return None if below is None else (below, output_nr)


def _whole_view(tensor: Tensor) -> Tensor | None:
    """The tensor that `tensor` is a reshaped view of, element for element."""
    base = view_base(tensor)
    if base is None or tensor.numel() != base.numel() or not (tensor.is_contiguous() and base.is_contiguous()):
        return None
    return base


def _edge(x: Tensor) -> Edge | None:
    """Where the gradient of an input goes, past reshapes (which only geometry needs)."""
    if not x.requires_grad:
        return None
    base = _whole_view(x) if x.grad_fn is not None else None
    x = x if base is None or not base.requires_grad else base
    if x.grad_fn is not None:
        return x.grad_fn, x.output_nr
    edge = get_gradient_edge(x)
    return edge.node, edge.output_nr


def _place(x: Tensor, output: Tensor, inplace: bool) -> tuple[Tensor, Edge | None]:
    """The tensor whose node receives the output's gradient, and the edge to the input.

    An in-place operation on a view makes autograd rebuild the view's node above the node of its base. So where the output is
    all of a base that is not the input's, or was changed in place, the base's node is taken: it stays in the graph.
    """
    holder = output
    base = _whole_view(output)
    if base is not None and (inplace or (base is not x and base is not view_base(x))):
        holder = base
    return holder, _first_edge(_node(holder)) if inplace else _edge(x)


def _node(tensor: Tensor) -> Node:
    node = tensor.grad_fn
    assert node is not None
    return node


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
