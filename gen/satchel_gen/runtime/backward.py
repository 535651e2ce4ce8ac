"""One backward under `backpack`: from the first node with a record that runs to the end of the graph task.

A layer's node brings δ. A parameter's fields are computed and set once all its uses have contributed: with the δ of the only
one, where that is known; otherwise when autograd is about to accumulate its gradient. Curvature is swept ahead, when the backward
reaches an extended loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from . import curvature, spared, survey
from .context import active, backpack
from .demand import CURVATURE, GRADIENT
from .errors import BatchAxisLost, FieldMissing, LossNotExtended, UnitUnknown
from .flags import Flag, first_raised
from .harvest import Gathered, Harvest
from .modes import in_grad_mode, without_autocast
from .plan import Plan, Step, walk
from .promise import Promise
from .pullback import operation
from .record import Edge, Entries, LossRecord, Mark, Record
from .rules import Sizes, registry
from .structure import Outline, Recognised, outline, recognised
from .torch_private import (
    at_end_of_backward,
    current_node,
    graph_task,
    is_accumulator,
    is_only_root,
    keeps_graph,
    node_outputs,
    transposition,
)
from .uses import Use
from .wanted import Wanted


def arrive(entries: Entries, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """The backward is about to run a node on which forward passes left `entries`; the gradients it is to take, if not these."""
    context = active()
    if context is not None and len(entries) > len(entries.losses):
        context.reached = True
    if context is None or not (context.extensions or context.extension_hook):
        if not keeps_graph():
            _release(entries)
        return None
    task = graph_task()
    running = context.passes.get(task)
    if running is None:
        running = context.passes[task] = Pass(context, task)
    return without_autocast(gradients, running.arrive, entries, gradients)


def _release(entries: Sequence[Mark]) -> None:
    for entry in entries:
        if isinstance(entry, Record | LossRecord):
            entry.release()


class Pass:
    """One graph task."""

    def __init__(self, context: backpack, task: int) -> None:
        self.context, self.task, self.demand = context, task, context.demand
        self.harvest = Harvest(context.demand)
        self.keep = keeps_graph()
        self.samples: int | None = None
        self.reductions: set[str] = set()
        self.sizes: Sizes | None = None
        self.surveyed: set[Node] = set()
        self.flags: list[Flag] = []
        self.promised: dict[Edge, Promise] = {}
        self.inner: set[Node] = set()
        self.expected: dict[int, Record] = {}
        self.finished: set[int] = set()
        self.wanted = Wanted()
        self.calls: dict[Node, Step] = {}
        self.hooked: set[int] = set()
        self.shared: set[int] = set()
        self.surveyed_all = False  # whether nothing runs but what has been surveyed
        self.handles: list[Any] = []
        at_end_of_backward(self.end)

    # ------------------------------------------------------------------------------------------------ nodes that run

    def arrive(self, entries: Entries, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        for loss in entries.losses:
            self._loss(loss, gradients[loss.output_nr])
        if not entries.losses:
            node = current_node()
            if node not in self.surveyed:
                self._below_no_loss(node, entries)
            if self.calls:
                self._calls(node, gradients)
        if self.promised:
            for edge in [edge for edge in self.promised if edge[0] is current_node()]:
                self._kept(edge, gradients)  # now: fields may be set next
        taken: tuple[Tensor, ...] | None = None
        for entry in reversed(entries):
            if isinstance(entry, Record) and (wanted := self.wanted.of(entry)):
                reached = self._layer(entry, wanted, gradients[entry.output_nr])
                if entry.definition.operation == spared.NODE:
                    taken = self._spared(wanted, gradients)
                self._finish(reached)
                continue
            self._hook(entry)
            if not (type(entry) is Mark or self.keep or self._is_promised(entry)):
                _release([entry])
        return taken

    def _loss(self, loss: LossRecord, gradient: Tensor | None) -> None:
        """Walk below a loss, and start curvature."""
        if loss.edge is None or gradient is None:
            return
        self.reductions.add(loss.options["reduction"])
        if len(self.reductions) > 1 or "none" in self.reductions:
            self._refuse_table5("of any layer")
        in_grad_mode(False, self._below_loss, loss, loss.edge, gradient)

    def _below_loss(self, loss: LossRecord, edge: Edge, gradient: Tensor) -> None:
        start = {edge: loss.input_shape}
        plan, outline = self._plan(start, below_loss=True)
        layers = plan.definitions or [operation()]
        curved = self.demand.features(layers, *CURVATURE)
        if curved:
            curvature.check_loss(loss, self.demand, layers)
        self.surveyed_all = not (self.surveyed or loss.differentiated) and is_only_root()
        plan = self._survey(plan, outline, start, loss, bool(curved))
        if curved:
            factors = curvature.Start(loss, gradient)
            self.flags += factors.flags(self.demand, layers)
            self._promise(factors, plan, curved)
            if self.context.debug:
                self.context.log(f"{loss.where}: {', '.join(curved)} over {len(plan.steps)} nodes")
            curvature.run(factors, plan, self.demand, self.harvest.accumulate)

    def _below_no_loss(self, node: Node, entries: Entries) -> None:
        """Walk below a node that no walk has met: nothing that needs curvature may be new there."""
        record = entries.record
        if record and not record.parameters and record.edge and record.edge[0] in self.surveyed:
            return  # walks went past a reshaping
        shapes = {(node, number): shape for number, (shape, _, _) in enumerate(node_outputs(node))}
        before = set(self.surveyed)
        marks = [entry for entry in entries if isinstance(entry, Mark)]
        plan = self._survey(*self._plan(shapes, below_loss=False), shapes, marks=marks)
        for step in plan.steps:
            for call in step.calls if step.node not in before else ():
                for name in call.parameters:
                    self._refuse_without_loss(call.record, name)

    def _plan(self, start: Mapping[Edge, Sequence[int]], below_loss: bool) -> tuple[Plan, Outline | None]:
        """The plan below some edges, and what graphs of its structure have in common, where that is all that a survey reads."""
        found = outline(start, self.wanted, self.samples, below_loss)
        known = None if found is None else recognised(start, found, self.wanted, self.demand.surveyed)
        return known or walk(start, self.wanted), found

    def _possible_samples(self, plan: Plan, shape: Sequence[int], curved: bool) -> list[int]:
        """Numbers of samples, by preference. A curved loss says it; a loss of flattened positions is a loss of the last layer's batch."""
        if not shape:
            raise BatchAxisLost(plan.records[0].where if plan.records else "the loss", shape, self.samples)
        if self.samples is not None:
            if shape[0] % max(self.samples, 1) or (curved and shape[0] != self.samples):
                raise BatchAxisLost(plan.records[0].where if plan.records else "the loss", shape, self.samples)
            return [self.samples]
        top = plan.records[0].output_shape if plan.records and not curved else ()
        flattened = bool(top) and top[0] > 0 and shape[0] % top[0] == 0
        return list(dict.fromkeys([*([top[0]] if flattened else []), shape[0]]))

    def _survey(
        self,
        plan: Plan,
        outline: Outline | None,
        start: Mapping[Edge, tuple[int, ...]],
        loss: LossRecord | None = None,
        curved: bool = False,
        marks: Sequence[Mark] = (),
    ) -> Plan:
        self.surveyed |= plan.nodes
        if isinstance(plan, Recognised):
            self.samples = plan.recall()
        else:
            shape = next(filter(None, start.values()), ())
            if loss is None and plan.records:
                shape = plan.records[0].output_shape
            samples = self._possible_samples(plan, shape, curved)
            plan, self.samples, flags = survey.check(plan, self.context, start, samples, curved, marks, outline)
            self.flags += flags
        for extension in self.demand.extensions:
            extension.check(self.samples)
        self.sizes = Sizes(self.samples, self._unit(self.samples))
        self.shared |= plan.tied.keys()
        self.expected |= plan.parameters
        for step in plan.called:
            if step.node not in self.calls:
                self.calls[step.node] = step
                if step.node is not current_node():
                    self.handles.append(step.node.register_prehook(partial(self._calls, step.node)))
        return plan

    def _unit(self, samples: int) -> float | None:
        """The unit u of ∇ℓ_n = u g_n, where the extended losses agree on one."""
        if len(self.reductions) != 1 or "none" in self.reductions:
            return None
        return 1.0 if "sum" in self.reductions else float(samples)

    def _calls(self, node: Node, gradients: tuple[Tensor | None, ...]) -> None:
        """A node without record that uses parameters is about to run, which frees it."""
        step = self.calls.pop(node, None)
        if step is not None:
            without_autocast(gradients, self._call, step, gradients)

    def _call(self, step: Step, gradients: tuple[Tensor | None, ...]) -> None:
        """Keep what δ means for the parameters."""
        columns = {number: delta[None] for number, delta in enumerate(gradients) if delta is not None}
        if not columns:
            return
        graph = torch.is_grad_enabled() and self.demand.differentiable
        for call in step.calls:
            asked = self.demand.needs([call.record.definition], GRADIENT)
            factor = in_grad_mode(graph, call.factor, columns) if asked else None
            self._finish(self._use(call.record, call.parameters, factor))

    def _layer(self, record: Record, wanted: Mapping[str, Tensor], delta: Tensor | None) -> list[Gathered]:
        """Keep δ until the parameters of the layer have been reached by all their uses; what has reached each."""
        if delta is None:
            any_parameter = next(iter(wanted.values()))
            delta = any_parameter.new_zeros(record.output_shape)
        # Of a parameter that another layer uses, too, δ may be asked for there.
        asked = self.demand.needs([record.definition], GRADIENT) or self.shared or not self.surveyed_all
        reached = self._use(record, wanted, record.column(delta) if asked else None)
        for gathered in reached if self.demand.deviations(record.definition) else ():
            use = self.harvest.takes_total(gathered)
            node = None if use is None else transposition(current_node(), self.wanted.accumulator(gathered.parameter))
            if use is not None and node is not None:
                self.handles.append(node.register_prehook(use.receive))
                gathered.waits = True
        return reached

    def _spared(self, wanted: Mapping[str, Tensor], gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...] | None:
        """δ of a convolution with the gradient of its kernel, where a feature computes the individual ones."""
        kernel, (delta, *others) = wanted.get(spared.KERNEL), gradients
        if kernel is None or delta is None or others or id(kernel) in self.shared:
            return None
        if not spared.may_be_given(kernel, delta):
            return None
        self._refuse_flagged()
        gradient = self.harvest.gradient(kernel)
        return None if gradient is None else (spared.given(delta, gradient),)

    def _use(self, record: Record, parameters: Mapping[str, Tensor], factor: Tensor | None) -> list[Gathered]:
        """Note a call's use of its parameters; what has reached each."""
        return [self.harvest.use(p, Use(record, name, factor)) for name, p in parameters.items()]

    def _finish(self, reached: Sequence[Gathered]) -> None:
        """Set the fields of parameters that a call has reached: now, if by their only use, or when autograd accumulates their gradients."""
        now = []
        for gathered in reached:
            if self.surveyed_all and id(gathered.parameter) not in self.shared and not gathered.waits:
                now.append(gathered)
            elif len(gathered.uses) == 1:
                node = self.wanted.accumulator(gathered.parameter)
                assert node is not None, "only wanted parameters are used"
                self.handles.append(node.register_prehook(partial(self._complete, [gathered])))
        if now:
            self._reap(now)

    def _promise(self, start: curvature.Start, plan: Plan, features: list[str]) -> None:
        """Note what an extended loss sends to its input: more than that would have curvature, too."""
        edge = plan.start[0]
        self.inner |= {step.node for step in plan.steps} - {edge[0]}
        if edge in self.promised:
            self.promised[edge].starts.append(start)
        elif not is_accumulator(edge[0]):
            self.promised[edge] = promise = Promise(start, features)
            self.handles += promise.watch(current_node())
            self.handles.append(edge[0].register_prehook(partial(self._kept, edge)))

    def _kept(self, edge: Edge, gradients: tuple[Tensor | None, ...]) -> None:
        delta, promise = gradients[edge[1]], self.promised.pop(edge, None)
        if promise is None:
            return
        if delta is not None and edge[0] not in self.inner:  # below another loss: what that sends here is swept
            self.flags += in_grad_mode(False, promise.flags, delta)
        if not self.keep:
            _release(promise.losses)

    def _is_promised(self, entry: Mark) -> bool:
        """Whether a loss may still be asked for what it sends."""
        if not isinstance(entry, LossRecord):
            return False
        return any(entry is loss for promise in self.promised.values() for loss in promise.losses)

    # ---------------------------------------------------------------------------------------------------- refusals

    def _refuse_without_loss(self, record: Record, name: str) -> None:
        self._refuse_table5(name)
        layer = record.definition
        curved = [
            extension.name
            for extension in self.demand.serving(layer, name)
            if any(need.curvature for _, need in self.demand.asked(extension, layer))
        ]
        if curved:
            raise LossNotExtended(
                record.where, name, curved, sorted({loss.module.__name__ for loss in registry().losses})
            )

    def _refuse_table5(self, name: str) -> None:
        for extension in self.demand.extensions:
            if extension.scaling == "table5":
                raise UnitUnknown(name, extension.name)

    def _refuse_flagged(self) -> None:
        """Read the flags, before a field is set."""
        if not self.flags:
            return
        error = first_raised(self.flags)
        self.flags.clear()
        if error is not None:
            raise error

    # ------------------------------------------------------------------------------------------------- parameters

    def _complete(self, reached: Iterable[Gathered], gradients: tuple[Tensor | None, ...] = ()) -> None:
        """Autograd is about to accumulate gradients: all uses of these parameters have been reached."""
        reached = [gathered for gathered in reached if gathered.uses]
        if reached:
            without_autocast([gathered.parameter for gathered in reached], self._reap, reached)

    def _reap(self, reached: Iterable[Gathered]) -> None:
        """Set the fields of some parameters, then run the hooks of modules complete with them."""
        assert self.sizes is not None, "a walk has met all that is reached"
        self._refuse_flagged()
        records: dict[Record, None] = {}
        for gathered in reached:
            uses = self.harvest.reap(gathered, self.sizes)
            for use in uses:
                records[use.record] = None
            self.finished.add(id(gathered.parameter))
            if self.context.debug:
                self.context.log(f"{uses[0].record.where}, parameter {uses[0].name!r}: fields set")
        for record in records:
            if self.finished.issuperset(map(id, self.wanted.of(record).values())):
                self._hook(record)
                if not self.keep:
                    record.release()

    def _hook(self, entry: Mark) -> None:
        """Call the user's hook, once for each leaf module."""
        hook = self.context.extension_hook
        if hook is None:
            return
        module = entry.module()
        if module is None or id(module) in self.hooked:
            return
        if not (_has_definition(entry) or _is_leaf(module)):
            return
        if all(id(p) in self.finished for p in module.parameters() if id(p) in self.expected):  # otherwise later
            self.hooked.add(id(module))
            hook(module)

    # ----------------------------------------------------------------------------------------------------- the end

    def end(self) -> None:
        """Autograd is done. Under `autograd.grad` it accumulates nothing, so parameters are finished here."""
        try:
            for gathered in self.harvest.pending:
                self._complete([gathered])
            self._refuse_flagged()
            for key, record in self.expected.items():
                if key not in self.finished:
                    name = next(n for n, parameter in record.trainable().items() if id(parameter) == key)
                    raise FieldMissing(record.where, name, self.demand.names)
            if not self.keep:
                _release([loss for promise in self.promised.values() for loss in promise.losses])
        finally:
            self.clean_up()
            self.context.passes.pop(self.task, None)

    def clean_up(self) -> None:
        """Leave nothing behind: pre-hooks on parameters live as long as the parameters."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.harvest.clear()
        self.surveyed.clear()
        self.calls.clear()
        self.wanted.clear()
        self.inner.clear()
        self.shared.clear()
        self.promised.clear()


def _has_definition(entry: Mark) -> bool:
    return type(entry) in (Record, LossRecord)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None
