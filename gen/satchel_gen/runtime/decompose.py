"""Lets a recurrent module run by operations that autograd sees one by one: fused, its parameters would be used by a single node."""

from __future__ import annotations

from typing import Any

from torch import nn

from .recorder import is_recording
from .rules import Composite
from .torch_private import switch_backend


class Decomposer:
    """Forward hooks of one module: switch backends off before its forward, and back after it, also where that raises."""

    def __init__(self, without: tuple[str, ...]) -> None:
        self.without = without
        #: What was on, for each forward that runs.
        self._before: list[dict[str, bool]] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._before.append({name: switch_backend(name, False) for name in self.without} if is_recording() else {})

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for name, on in self._before.pop().items() if self._before else ():
            switch_backend(name, on)


def decompose(module: nn.Module, composite: Composite) -> None:
    """Add the hooks, once."""
    if any(isinstance(getattr(hook, "__self__", None), Decomposer) for hook in module._forward_pre_hooks.values()):
        return
    decomposer = Decomposer(composite.without)
    module.register_forward_pre_hook(decomposer.before)
    module.register_forward_hook(decomposer.after, always_call=True)
