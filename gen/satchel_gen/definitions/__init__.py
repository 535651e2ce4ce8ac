"""WHAT satchel computes: one file per layer, loss and feature. Files are found, not listed."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..calculus.derive import Constant, Statement
from ..notation import (
    NDIM,
    After,
    Equal,
    Index,
    Length,
    LogSumExp,
    Option,
    Sum,
    extent,
    finite,
    indices,
    options,
    sigmoid,
    softplus,
    tensors,
)
from .distributions import Bernoulli, Categorical, Laplace, NoDistribution, Normal, Poisson
from .model import (
    Classes,
    Composite,
    DefinitionError,
    Example,
    Feature,
    Layer,
    Loss,
    NodeCall,
    Passing,
    Quantity,
    Refused,
    activation,
    z,
)
from .operation import Operation, OperationNode


@dataclass(frozen=True)
class Definitions:
    """All that is defined, sorted by name."""

    layers: tuple[Layer, ...]
    passing: tuple[Passing, ...]
    losses: tuple[Loss, ...]
    features: tuple[Feature, ...]
    composites: tuple[Composite, ...] = ()
    operations: tuple[Operation, ...] = ()

    def only(self, names: set[str]) -> Definitions:
        """The layers and losses of these names (all where empty), with every feature."""
        known = {d.name for d in (*self.layers, *self.passing, *self.losses)}
        if names - known:
            raise DefinitionError(
                f"unknown: {', '.join(sorted(names - known))}; defined are {', '.join(sorted(known))}"
            )
        if not names:
            return self
        return Definitions(
            tuple(d for d in self.layers if d.name in names),
            tuple(d for d in self.passing if d.name in names),
            tuple(d for d in self.losses if d.name in names),
            self.features,
            self.composites,
            self.operations,
        )


def load() -> Definitions:
    """Import every file under layers/, losses/, features/ and operations/ and collect what it defines."""
    kinds = (Layer, Passing, Loss, Feature, Composite, Operation)
    found: dict[type, dict[str, Any]] = {kind: {} for kind in kinds}
    for folder in ("layers", "losses", "features", "operations"):
        for module in _modules(folder):
            for value in vars(module).values():
                if isinstance(value, kinds) and str(value.source.file) == module.__file__:
                    known = found[type(value)].setdefault(value.name, value)
                    if known is not value:
                        raise DefinitionError(f"{value.source}: {value.name} is already defined at {known.source}")
    return Definitions(*(tuple(found[kind][name] for name in sorted(found[kind])) for kind in kinds))


def _modules(folder: str) -> list[ModuleType]:
    package = importlib.import_module(f".{folder}", __package__)
    return [
        importlib.import_module(f"{package.__name__}.{info.name}")
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name)
    ]


__all__ = [
    "NDIM", "After", "Bernoulli", "Categorical", "Classes", "Composite", "Constant", "DefinitionError", "Definitions", "Equal",
    "Example", "Feature", "Index", "Laplace", "Layer", "Length", "LogSumExp", "Loss", "NoDistribution", "NodeCall", "Normal",
    "Operation", "OperationNode", "Option", "Passing", "Poisson", "Quantity", "Refused", "Statement", "Sum", "activation",
    "extent", "finite", "indices", "load", "options", "sigmoid", "softplus", "tensors", "z",
]  # fmt: skip
