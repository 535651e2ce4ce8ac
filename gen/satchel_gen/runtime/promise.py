"""What extended losses send to their input. Were it to receive more, that would come from what has curvature, too, but no record."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from .curvature import Start
from .errors import LossIncomplete
from .flags import Flag
from .record import Edge, LossRecord
from .spared import plain
from .torch_private import version


class Promise:
    """The gradient that losses send to one edge. It is computed only if what arrives there is not the very tensor that was sent."""

    def __init__(self, start: Start, features: Sequence[str]) -> None:
        self.starts, self.features = [start], features
        self.sent: tuple[Tensor, int] | None = None  # with its version

    @property
    def losses(self) -> list[LossRecord]:
        return [start.loss for start in self.starts]

    def watch(self, node: Node) -> Sequence[RemovableHandle]:
        """See what the loss whose node this is sends, where one node does that and nobody else can reach that node."""
        (start,) = self.starts
        edge = start.edge
        sender = _only_sender(node, edge) if start.loss.direct else None
        if sender is None:
            return []

        def see(sent: tuple[Tensor | None, ...], arrived: tuple[Tensor | None, ...]) -> None:
            own = zip(sent, sender.next_functions, strict=True)
            self.sent = next(
                ((tensor, version(tensor)) for tensor, to in own if to == edge and tensor is not None), None
            )

        return [sender.register_hook(see)]

    def flags(self, delta: Tensor) -> Sequence[Flag]:
        """Whether more has arrived."""
        delta = plain(delta)
        sent, unchanged = self.sent or (None, 0)
        if delta is sent and version(delta) == unchanged and len(self.starts) == 1:
            return []
        promised = reduce(add, (start.gradient for start in self.starts))
        precision = max(torch.finfo(tensor.dtype).eps for tensor in (delta, promised)) ** 0.5
        off, size = torch.dist(delta, promised), delta.norm() + promised.norm()
        return [(off > 4 * precision * size, LossIncomplete(self.starts[0].loss.where, self.features))]


def _only_sender(root: Node, edge: Edge) -> Node | None:
    """The node from `root` down that sends a gradient to an edge, if it is one, and sends one."""
    found: list[Node] = []
    stack, seen = [root], {edge[0]}
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            found += [node for to in node.next_functions if to == edge]
            stack += [below for below, _ in node.next_functions if below is not None]
    return found[0] if len(found) == 1 else None
