"""The engine: records in the autograd graph, a walk to a plan, sweeps over it, fields on parameters. It names no layer.

recorder, record    the forward hook and what it leaves in the graph
context, backward   the active features, and one backward under them
plan, survey        what lies below a loss, and what is refused
structure           graphs that have been surveyed, recognised
probe, flags        whether samples mix, and what else only values can tell
sweep, passing      columns through layers, and through nodes without a definition
curvature           the factors of a loss, swept
second, residual    second derivatives of a node, and of any step: a diagonal or blocks
hessian, mixed      DiagHessian's recursion, and its term for parameters used in sequence
averaged, joint     KFRA's recursion, and curvature over several live edges
demand, uses        what features ask for, and what a parameter's uses give
harvest, fields     what a pass has gathered for a parameter, and the tensors that it becomes
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
