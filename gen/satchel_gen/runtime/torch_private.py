"""The private names of torch that the engine stands on, each behind a function of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

#: Nodes that take the entries of the first axis one by one, unless that is an axis which they have saved by name.
ROWWISE = frozenset(
    f"{name}Backward{k}"
    for k, names in enumerate((
        # elementwise
        "Abs Add Alias Clone Div Elu Exp Expm1 Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu Log Log1P LogSigmoid Mish Mul NativeDropout "
        "Neg Pow Reciprocal Relu Rsqrt Sigmoid Silu Softplus Softshrink Sqrt Sub Tanh Threshold ToCopy "
        # by samples and channels
        "AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D AvgPool2D AvgPool3D MaxPool2DWithIndices "
        "MaxPool3DWithIndices ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D "
        "UpsampleBicubic2D UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleTrilinear3D "
        # along the axes that they have saved
        "Bmm Cat Expand LogSoftmax Permute Select Slice Softmax Split SplitWithSizes Transpose Unbind UnsafeSplit Unsqueeze",
        "Mean Pow Squeeze Sum",
    ))
    for name in names.split()
)  # fmt: skip


def graph_task() -> int:
    """Number of the backward that runs in this thread, -1 outside."""
    return torch._C._current_graph_task_id()


def current_node() -> Node:
    """The node whose pre-hook runs."""
    node = torch._C._current_autograd_node()
    assert node is not None
    return node


def keeps_graph() -> bool:
    """Whether the running backward retains the graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run `callback` when the running backward is done; it is not called if a node raises."""
    Variable._execution_engine.queue_callback(callback)


def accumulator(parameter: Tensor) -> Node:
    """The node that adds to `parameter.grad`."""
    return get_gradient_edge(parameter).node


def computes_gradient_of(parameter: Tensor) -> bool:
    """Whether the running backward computes a leaf's gradient: `backward(inputs=…)` and `autograd.grad` leave others out."""
    try:
        return torch._C._will_engine_execute_node(accumulator(parameter))
    except RuntimeError:  # torch refuses to tell for a leaf that autograd.grad asks for
        return True


def node_outputs(node: Node) -> Sequence[tuple[tuple[int, ...], torch.dtype, torch.device]]:
    """Shape, dtype and device of each gradient that `node` receives."""
    return [(tuple(m.shape), m.dtype, m.device) for m in node._input_metadata]


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def view_base(tensor: Tensor) -> Tensor | None:
    """The tensor that `tensor` is a differentiable view of."""
    return tensor._base if tensor._is_view() else None


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


def is_reentrant_checkpoint(node: Node) -> bool:
    return node.name() == "CheckpointFunctionBackward"


def metadata(node: Node) -> dict[str, Any]:
    """A dictionary that lives as long as the node."""
    return node.metadata  # type: ignore[return-value]


def leaf_of(node: Node) -> Tensor | None:
    """The leaf whose gradient the node accumulates, if it is such a node."""
    return getattr(node, "variable", None)


def is_accumulator(node: Node) -> bool:
    return node.name() == "torch::autograd::AccumulateGrad"


def normalised_shape(node: Node) -> tuple[int, ...] | None:
    """Shape that a normalisation took statistics over per channel, if the node is one (batch normalisation in training mode)."""
    if getattr(node, "_saved_training", False) is not True:
        return None
    return tuple(node._saved_input.shape)  # type: ignore[attr-defined]


def keeps_rows(node: Node, before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether entries of the first axis of an input of shape `before` are computed to those of an output of shape `after`, one by one."""
    if node.name() not in ROWWISE or not before or not after or before[0] != after[0]:
        return False
    first = {0, -len(before), -len(after)}
    axes = [saved(node, name) for name in ("dim", "dim0", "dim1")]
    touched = {
        _signed(axis) for some in axes if some is not None for axis in (some if isinstance(some, tuple) else (some,))
    }
    order = saved(node, "dims")
    aligned = len(before) == len(after) or bool(touched)  # otherwise a smaller operand is broadcast from the last axis
    return aligned and first.isdisjoint(touched) and (order is None or _signed(order[0]) in first)


def _signed(axis: int) -> int:
    """torch shows a negative axis as an unsigned number."""
    return axis - (1 << 64) if axis >> 63 else axis


def saved(node: Node, name: str) -> Any:
    """What a node has saved for its backward, a tensor or a setting; None if it saved none. Raises RuntimeError if it was freed."""
    return getattr(node, f"_saved_{name}", None)


def has_sparse_gradient(node: Node) -> bool:
    """Whether the node sends a sparse gradient to its parameter."""
    return getattr(node, "_saved_sparse", False) is True


def switch_backend(name: str, on: bool) -> bool:
    """Turn a backend ("mkldnn", "cudnn") on or off for the process; whether it was on."""
    before: bool = getattr(torch._C, f"_get_{name}_enabled")()
    getattr(torch._C, f"_set_{name}_enabled")(on)
    return before
