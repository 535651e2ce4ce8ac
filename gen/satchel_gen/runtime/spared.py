"""A convolution's backward that is given the gradient of its kernel: autograd need not compute it where a feature has the individual
ones, whose sum it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .torch_private import accumulator, current_node

#: The operation of torch.
_BACKWARD = torch.ops.aten.convolution_backward.default
#: What the operation's node is called, its parameter with individual gradients, and the place of that among the node's inputs.
NODE, KERNEL, _PLACE = "ConvolutionBackward0", "weight", 1


class _Delta(Tensor):
    """δ that arrives at a convolution, with the gradient of its kernel. Any other operation sees a plain tensor."""

    delta: Tensor
    gradient: Tensor

    @staticmethod
    def __new__(cls, delta: Tensor, gradient: Tensor) -> _Delta:
        made: _Delta = Tensor._make_wrapper_subclass(
            cls, delta.shape, strides=delta.stride(), dtype=delta.dtype, device=delta.device
        )
        made.delta, made.gradient = delta, gradient
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch: the first argument is the operation
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is _BACKWARD and type(args[0]) is cls:
            return args[0]._backward(*args[1:])
        plain_args, plain_kwargs = tree_map(plain, (tuple(args), dict(kwargs or {})))
        return function(*plain_args, **plain_kwargs)

    def _backward(self, *operands: Any) -> tuple[Tensor | None, ...]:
        *rest, (to_input, to_kernel, to_bias) = operands
        if not to_kernel:
            return _BACKWARD(self.delta, *operands)
        places = [axis for axis in range(self.ndim) if axis != 1]
        # Asked for the bias's gradient, oneDNN computes the kernel's, too.
        by_bias = self.delta.sum(places) if to_bias else None
        by_input = _BACKWARD(self.delta, *rest, (True, False, False))[0] if to_input else None
        return by_input, self.gradient, by_bias


def plain(value: Any) -> Any:
    """δ as autograd computed it; whatever else as it is."""
    return value.delta if type(value) is _Delta else value


def may_be_given(kernel: Tensor, delta: Tensor) -> bool:
    """Whether the convolution that is about to run adds to the gradient of `kernel`, nothing else, and is not differentiated.

    On a CPU: elsewhere blocks that fit into its caches are small, and autograd's own product costs little.
    """
    if torch.is_grad_enabled() or type(delta) is not Tensor or not delta.is_cpu:
        return False
    return delta.dtype == kernel.dtype and current_node().next_functions[_PLACE][0] is accumulator(kernel)


def given(delta: Tensor, gradient: Tensor) -> Tensor:
    """δ for the node: it computes the other gradients alone."""
    return _Delta(delta, gradient)
