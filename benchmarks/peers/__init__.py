"""Who is measured. One module per implementation, which needs torch and that implementation only.

A module here offers
    DISTRIBUTION  what is installed, for the version
    FEATURES      which of the ten features it has
    VARIANT       how its Kronecker factors treat positions, as satchel's `approximation` names it; "" for satchel's default
    build(task, features) → compute, which makes forward and backward, leaves gradients in `.grad`, and returns what it has found.
Results are lists in the order of the parameters, in BackPACK's scaling: {"KFAC": [[B, A], [B], …], "Variance": [v, …], …}.
Factors that a parameter has not are None.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from problems import Task

Results = dict[str, list[Any]]
Compute = Callable[[], Results]

#: Names on the command line, and the modules here.
PEERS = {
    "satchel": "satchel_api",
    "backpack": "backpack_api",
    "opacus": "opacus_api",
    "torch.func": "functorch_api",
    "curvlinops": "curvlinops_api",
    "asdfghjkl": "asdfghjkl_api",
    "loop": "loop_api",
}


class Unsupported(Exception):
    """The implementation does not have this, for the reason given."""


def take(parameter: Any, field: str) -> Any:
    """A field that a pass has left, which is then gone from the parameter."""
    if field not in vars(parameter):
        raise Unsupported(f"leaves no {field} on a parameter [{', '.join(map(str, parameter.shape))}]")
    return vars(parameter).pop(field)


def build(name: str, task: Task, features: tuple[str, ...]) -> Compute:
    """Raises Unsupported."""
    peer = import_module(f"peers.{PEERS[name]}")
    if missing := [feature for feature in features if feature not in peer.FEATURES]:
        raise Unsupported(f"has no {', '.join(missing)}")
    compute: Compute = peer.build(task, features)
    return compute
