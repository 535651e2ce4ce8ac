"""The engine: records in the autograd graph, a walk to a plan, sweeps over it, fields on parameters. It names no layer.

recorder, record    the forward hook and what it leaves in the graph
context, backward   the active features, and one backward under them
plan, survey        what lies below a loss, and what is refused
sweep, passing      columns through layers, and through nodes without a definition
curvature           the factors of a loss; residual and averaged add DiagHessian's and KFRA's recursions
uses, demand        what a parameter's uses give, and what features ask for
"""

from __future__ import annotations

from .context import backpack
from .errors import SatchelError
from .extend import extend
from .extension import Extension
from .recorder import disable
from .rules import Layer, Loss, Need, Registry, Rule, Sizes, install
from .settings import backend, settings

__all__ = [
    "Extension",
    "Layer",
    "Loss",
    "Need",
    "Registry",
    "Rule",
    "SatchelError",
    "Sizes",
    "backend",
    "backpack",
    "disable",
    "extend",
    "install",
    "settings",
]
