"""The private names of torch that the engine stands on, each behind a function of ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import Node, get_gradient_edge

#: Nodes whose vmapped backward is wrong without an error (they read the geometry of a batched tensor): called column by column.
COLUMNWISE = ("CdistBackward0", "torch::autograd::CopySlices", "AsStridedBackward0")

#: Nodes whose output holds elements of their one input, each once.
VIEWS = (
    "AliasBackward0", "PermuteBackward0", "SelectBackward0", "SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0",
    "SqueezeBackward1", "TBackward0", "TransposeBackward0", "TransposeBackward1", "UnbindBackward0", "UnsafeSplitBackward0",
    "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
)  # fmt: skip

#: Nodes whose output holds all elements of their one input in the same order.
RESHAPING = ("UnsafeViewBackward0", "ViewBackward0")

#: Nodes that act on each entry of an axis by itself: by samples and channels, of which the first axis is one, …
_BY_SAMPLE = frozenset({
    "AdaptiveAvgPool2DBackward0", "AdaptiveAvgPool3DBackward0", "AdaptiveMaxPool2DBackward0", "AdaptiveMaxPool3DBackward0",
    "AvgPool2DBackward0", "AvgPool3DBackward0", "BmmBackward0", "MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0",
    "ReflectionPad1DBackward0", "ReflectionPad2DBackward0", "ReflectionPad3DBackward0", "ReplicationPad1DBackward0",
    "ReplicationPad2DBackward0", "ReplicationPad3DBackward0", "UpsampleBicubic2DBackward0", "UpsampleBilinear2DBackward0",
    "UpsampleLinear1DBackward0", "UpsampleNearest1DBackward0", "UpsampleNearest2DBackward0", "UpsampleNearest3DBackward0",
    "UpsampleTrilinear3DBackward0",
})  # fmt: skip
#: … elementwise, where a smaller operand is broadcast, or along one axis that they have saved, …
_ELEMENTWISE = frozenset({
    "AbsBackward0", "AddBackward0", "AliasBackward0", "CatBackward0", "CloneBackward0", "DivBackward0", "EluBackward0",
    "ExpBackward0", "ExpandBackward0", "Expm1Backward0", "GeluBackward0", "HardsigmoidBackward0", "HardswishBackward0",
    "HardtanhBackward0", "LeakyReluBackward0", "LogBackward0", "Log1PBackward0", "LogSigmoidBackward0", "LogSoftmaxBackward0",
    "MishBackward0", "MulBackward0", "NativeDropoutBackward0", "NegBackward0", "PowBackward0", "ReciprocalBackward0",
    "ReluBackward0", "RsqrtBackward0", "SigmoidBackward0", "SiluBackward0", "SliceBackward0", "SoftmaxBackward0",
    "SoftplusBackward0", "SoftshrinkBackward0", "SplitBackward0", "SplitWithSizesBackward0", "SqrtBackward0", "SubBackward0",
    "TanhBackward0", "ThresholdBackward0", "ToCopyBackward0", "UnsafeSplitBackward0", "PowBackward1",
})  # fmt: skip
#: … or by another arrangement of the axes, or a sum over some.
_ARRANGING = frozenset({
    "MeanBackward1", "PermuteBackward0", "SelectBackward0", "SqueezeBackward1", "SumBackward1", "TransposeBackward0",
    "UnbindBackward0", "UnsqueezeBackward0",
})  # fmt: skip
AXISWISE = _BY_SAMPLE | _ELEMENTWISE | _ARRANGING


#: A dictionary that lives as long as the node.
metadata: Callable[[Node], dict[str, Any]] = attrgetter("metadata")
#: Whether operations are cast on some device. These are no functions of ours: such a call takes a microsecond where caches are cold.
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
#: Number of the backward that runs in this thread, -1 outside.
graph_task: Callable[[], int] = torch._C._current_graph_task_id
#: Whether the running backward retains the graph.
keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph
#: The tensor that a tensor is a differentiable view of, or None.
view_base: Callable[[Tensor], Tensor | None] = attrgetter("_base")
#: The type of the nodes that add to the gradients of leaves.
ACCUMULATOR: type[Node] = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)
#: Shape of a gradient that a node receives.
_shape: Callable[[Any], list[int]] = attrgetter("shape")
#: What `nn.Linear` puts between its product and its weight.
_TRANSPOSE = "TBackward0"


def current_node() -> Node:
    """The node whose pre-hook runs."""
    node = torch._C._current_autograd_node()
    assert node is not None
    return node


def is_only_root() -> bool:
    """Whether the running backward began at the node whose pre-hook runs, and only there."""
    threads = torch._C._is_multithreading_enabled()
    torch._C._set_multithreading_enabled(False)  # torch tells the order of a single thread
    try:
        order: list[Node] = torch._C._current_graph_task_execution_order()  # type: ignore[attr-defined]
        return order[0] is current_node()
    except RuntimeError:  # some nodes have run: torch cannot count their dependents any more
        return False
    finally:
        torch._C._set_multithreading_enabled(threads)


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run `callback` when the running backward is done; it is not called if a node raises."""
    Variable._execution_engine.queue_callback(callback)


def accumulator(parameter: Tensor) -> Node:
    """The node that adds to `parameter.grad`."""
    return get_gradient_edge(parameter).node


def accumulators_below(node: Node) -> Iterator[tuple[Tensor, Node]]:
    """The leaves that a node sends gradients to, directly or through a transpose, with the nodes that add these."""
    for below, _ in node.next_functions:
        if below is not None and type(below).__name__ == _TRANSPOSE:
            below = below.next_functions[0][0]
        if type(below) is ACCUMULATOR and (leaf := leaf_of(below)) is not None:
            yield leaf, below


def will_run(accumulator: Node) -> bool:
    """Whether the running backward computes a leaf's gradient: `backward(inputs=…)` and `autograd.grad` leave others out."""
    try:
        return torch._C._will_engine_execute_node(accumulator)
    except RuntimeError:  # torch refuses to tell for a leaf that autograd.grad asks for
        return True


def node_outputs(node: Node) -> Sequence[tuple[tuple[int, ...], torch.dtype, torch.device]]:
    """Shape, dtype and device of each gradient that `node` receives."""
    return [(tuple(m.shape), m.dtype, m.device) for m in node._input_metadata]


def node_output_count(node: Node) -> int:
    """How many gradients `node` receives."""
    return len(node._input_metadata)


def node_output_shapes(node: Node) -> tuple[tuple[int, ...], ...]:
    """Shapes of all gradients that `node` receives."""
    return tuple(map(tuple, map(_shape, node._input_metadata)))


def node_output_shape(node: Node, output_nr: int) -> tuple[int, ...]:
    """Shape of one of the gradients that `node` receives."""
    return tuple(node._input_metadata[output_nr].shape)


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place."""
    try:
        return tensor._version
    except RuntimeError:  # inference tensors have none
        return 0


def held_elsewhere(tensor: Tensor) -> bool:
    """Whether anything besides this tensor holds its memory: another tensor, an array, a graph, a storage, another process."""
    storage = tensor.untyped_storage()
    return storage.is_shared() or _holders(storage) != _of_one_tensor()


@cache
def _of_one_tensor() -> tuple[int, int]:
    tensor = torch.empty(0)
    storage = tensor.untyped_storage()
    return _holders(storage)


def _holders(storage: torch.UntypedStorage) -> tuple[int, int]:
    """Those of the storage as an object of Python, and those in C++."""
    return sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


def inside_functorch() -> bool:
    """Whether vmap, grad, jvp or functionalisation from torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def inside_checkpoint() -> bool:
    """Whether a non-reentrant checkpointed region runs: its saved tensors may be unpacked only once."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def is_python_function(node: Node) -> bool:
    """A `torch.autograd.Function`, which is called by `apply`."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def reentrant_checkpoint(nodes: Iterable[Node]) -> str | None:
    """The name of the nodes that run a reentrant checkpoint's backward, if there are any."""
    name = "CheckpointFunctionBackward"
    return name if name in {type(node).__name__ for node in nodes} else None


def leaf_of(node: Node) -> Tensor | None:
    """The leaf whose gradient the node accumulates, if it is such a node."""
    return getattr(node, "variable", None)


def transposition(node: Node, accumulator: Node | None) -> Node | None:
    """The node between that of a linear layer and its parameter's: it receives the transpose of what the layer adds to the gradient."""
    for above, _ in node.next_functions:
        if above is not None and type(above).__name__ == _TRANSPOSE and above.next_functions[0][0] is accumulator:
            return above
    return None


def is_accumulator(node: Node) -> bool:
    return type(node) is ACCUMULATOR


def normalised_shape(node: Node) -> tuple[int, ...] | None:
    """Shape that a normalisation took statistics over per channel, if the node is one (batch normalisation in training mode)."""
    if getattr(node, "_saved_training", False) is not True:
        return None
    return tuple(node._saved_input.shape)  # type: ignore[attr-defined]


def axis_before(node: Node, axis: int, before: Sequence[int], after: Sequence[int]) -> int | None:
    """The axis of an input of shape `before` whose entries give those of an axis of the output of shape `after`, one by one.

    None: there is none, or it is not known.
    """
    name = node.name()
    found: int | None = None
    if name in _BY_SAMPLE:
        found = 0 if axis == 0 else None
    elif name in _ELEMENTWISE:
        along = saved(node, "dim")
        apart = along is None or _signed(along) % len(after) != axis
        found = axis + len(before) - len(after) if apart else None
    elif name in _ARRANGING:
        found = _arranged(node, name, axis, len(before), len(after))
    return found if found is not None and 0 <= found < len(before) and before[found] == after[axis] else None


def axis_structure(node: Node) -> Hashable | None:
    """What besides shapes says where the axes of a node's outputs are in its inputs; None if that is not known of such nodes."""
    kind = type(node)
    axes = _saved_axes(kind)
    return (kind, *[getattr(node, along) for along in axes]) if axes else (None if axes is None else kind)


@cache
def _saved_axes(kind: type[Node]) -> tuple[str, ...] | None:
    """The attributes of such a node that say along which axes it works; None if more than these may matter."""
    name = kind.__name__
    if name in RESHAPING or name in _BY_SAMPLE:
        return ()
    if name not in _ELEMENTWISE and name not in _ARRANGING:
        return None
    return tuple(along for along in ("_saved_dim", "_saved_dims", "_saved_dim0", "_saved_dim1") if hasattr(kind, along))


def _arranged(node: Node, name: str, axis: int, before: int, after: int) -> int | None:
    """The axis among the `before` ones which is the given one of `after`."""
    if name == "PermuteBackward0":
        return _signed(saved(node, "dims")[axis]) % before
    if name == "TransposeBackward0":
        pair = [_signed(saved(node, which)) % before for which in ("dim0", "dim1")]
        return pair[1 - pair.index(axis)] if axis in pair else axis
    own = saved(node, "dim")
    if name == "UnsqueezeBackward0":
        place = _signed(own) % after
        return None if axis == place else axis - (axis > place)
    gone = {_signed(one) % before for one in (own if isinstance(own, tuple) else (own,))}
    if before == after:  # summed axes are kept, with extent 1
        return None if axis in gone else axis
    return [one for one in range(before) if one not in gone][axis]


def _signed(axis: int) -> int:
    """torch shows a negative axis as an unsigned number."""
    return axis - (1 << 64) if axis >> 63 else axis


def saved(node: Node, name: str) -> Any:
    """What a node has saved for its backward, a tensor or a setting; None if it saved none. Raises RuntimeError if it was freed."""
    return getattr(node, f"_saved_{name}", None)


def weight_of_targets(node: Node) -> Tensor | None:
    """What a mean of negative log-likelihoods has divided by, if the node is one and has counted in full precision."""
    if type(node).__name__ not in ("NllLossBackward0", "NllLoss2DBackward0"):
        return None
    total: Tensor = saved(node, "total_weight")
    return total if total.dtype in (torch.float32, torch.float64) else None


def has_sparse_gradient(node: Node) -> bool:
    """Whether the node sends a sparse gradient to its parameter."""
    return getattr(node, "_saved_sparse", False) is True


def switch_backend(name: str, on: bool) -> bool:
    """Turn a backend ("mkldnn", "cudnn") on or off for the process; whether it was on."""
    before: bool = getattr(torch._C, f"_get_{name}_enabled")()
    getattr(torch._C, f"_set_{name}_enabled")(on)
    return before


def has_product(*matrices: Tensor) -> bool:
    """Whether oneDNN multiplies them: float32 on a CPU, and nothing that is differentiated."""
    return (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch._C._get_mkldnn_enabled()
        and all(m.device.type == "cpu" and m.dtype == torch.float32 for m in matrices)
        and not (torch.is_grad_enabled() and any(m.requires_grad for m in matrices))
    )


def has_exact_products() -> bool:
    """Whether products of float32 on a CPU are those of float32, not of a narrower dtype."""
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    return getattr(settings, "fp32_precision", "ieee") in ("none", "ieee")


def product(left: Tensor, right: Tensor) -> Tensor:
    """A Bᵀ [M, L] of A [M, K] and B [L, K], as oneDNN computes a linear layer: `torch.mm` is MKL's, half as fast where it does not
    know the processor."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left.contiguous(), right.contiguous(), None, "none", [], "")
    return found
