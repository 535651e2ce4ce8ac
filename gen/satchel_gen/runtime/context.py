"""`with backpack(...)`: which features are active, and the passes that run under them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .demand import Demand
from .errors import NotAnExtension, NothingReached
from .extension import Extension

if TYPE_CHECKING:
    from .backward import Pass

#: Active contexts, innermost last. Of the process, not of a thread: on GPUs backward runs in threads of its own.
_active: list[backpack] = []


class backpack:
    """Compute features during backward.

        with backpack(BatchGrad(), KFAC(mc_samples=1)):
            loss.backward()
        parameter.grad_batch, parameter.kfac

    extension_hook: called with each module, in backward order, loss first, once its fields are set.
    debug: print what the engine does.
    retain_graph: accepted for compatibility; whether the graph is retained is detected.
    strict: whether a feature without a value for a parameter that no definition covers is an error (True), or a warning and left
        out for that parameter (False).

    Contexts nest: the innermost is in force. Raises ValueError if given a class or anything but a feature, and RuntimeError if the
    block ends without a backward through an extended module.
    """

    def __init__(
        self,
        *extensions: Extension,
        extension_hook: Callable[[nn.Module], Any] | None = None,
        debug: bool = False,
        retain_graph: bool = False,
        strict: bool = True,
    ) -> None:
        for extension in extensions:
            if not isinstance(extension, Extension):
                raise NotAnExtension(extension)
        self.extensions = extensions
        self.extension_hook = extension_hook
        self.debug = debug
        self.retain_graph = retain_graph
        self.strict = strict
        self.demand = Demand(extensions)
        self.passes: dict[int, Pass] = {}
        self.reached = False

    def __enter__(self) -> backpack:
        self.reached = False
        _active.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        _active.remove(self)
        for unfinished in list(self.passes.values()):  # a node raised, so autograd did not end the pass
            unfinished.clean_up()
        self.passes.clear()
        if kind is None and self.extensions and not self.reached:
            raise NothingReached(self.demand.names)

    def log(self, message: str) -> None:
        """Print what the engine does; to be asked for under `debug`."""
        print(f"[backpack] {message}")


def active() -> backpack | None:
    return _active[-1] if _active else None
