"""`extend`: makes a module leave records in its forward passes."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .decompose import decompose
from .errors import NotAModule
from .recorder import Recorder
from .rules import registry

Module = TypeVar("Module", bound=nn.Module)


def extend(module: Module) -> Module:
    """Let `module` and all modules inside serve `backpack`; returns it.

    Adds one forward hook to each module, and to recurrent ones a pair that has them run unfused; nothing else. May be called
    again, also on a part or on the whole of an extended module, before or after modules are exchanged. Raises TypeError for
    anything but a module.
    """
    if not isinstance(module, nn.Module):
        raise NotAModule(module)
    for name, inner in module.named_modules():
        recorder = next((hook for hook in inner._forward_hooks.values() if isinstance(hook, Recorder)), None)
        if recorder is None:
            # First of all hooks: one that changes the output comes after the record, as another operation.
            inner.register_forward_hook(Recorder(name), with_kwargs=True, prepend=True)
        elif len(name) > len(recorder.name):  # extended as a part before: the longer path says more
            recorder.name = name
        composite = registry().composite(inner)
        if composite is not None:
            decompose(inner, composite)
    return module
