"""One backward under `backpack`: from the first node with a record that runs to the end of the graph task.

A layer's node brings δ. When autograd is about to accumulate a parameter's gradient, all uses of the parameter have contributed, so
its fields are computed and set then. Curvature is swept ahead, when the backward reaches an extended loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import curvature, survey
from .context import active, backpack
from .demand import CURVATURE, Source, source
from .errors import BatchAxisLost, FieldMissing, LossNotExtended, UnitUnknown
from .extension import Extension
from .fields import Owner
from .plan import walk
from .record import Edge, Entry, LossRecord, Mark, Record
from .rules import Layer, Sizes, registry
from .survey import first_raised
from .sweep import at_output
from .torch_private import (
    accumulator,
    at_end_of_backward,
    computes_gradient_of,
    current_node,
    graph_task,
    keeps_graph,
    node_outputs,
)
from .uses import Use, quantities

GRADIENT, INPUT = Source("gradient"), Source("input")


def arrive(entries: Sequence[Entry], gradients: tuple[Tensor | None, ...]) -> None:
    """The backward is about to run a node on which forward passes left `entries`."""
    context = active()
    if context is not None and any(not isinstance(entry, LossRecord) for entry in entries):
        context.reached = True
    if context is None or (not context.extensions and context.extension_hook is None):
        if not keeps_graph():
            _release(entries)
        return
    task = graph_task()
    if task not in context.passes:
        context.passes[task] = Pass(context, task)
    device = next((gradient.device.type for gradient in gradients if gradient is not None), "cpu")
    with torch.autocast(device, enabled=False):
        context.passes[task].arrive(entries, gradients)


def _release(entries: Sequence[Entry]) -> None:
    for entry in entries:
        if isinstance(entry, Record | LossRecord):
            entry.release()


class Pass:
    """What one graph task has gathered so far."""

    def __init__(self, context: backpack, task: int) -> None:
        self.context, self.task, self.demand = context, task, context.demand
        self.keep = keeps_graph()
        self.samples: int | None = None
        self.reductions: set[str] = set()
        self.surveyed: set[Any] = set()
        self.flags: list[curvature.Flag] = []
        self.expected: dict[int, Record] = {}
        self.wanted_cache: dict[int, bool] = {}
        self.parameters: dict[int, Tensor] = {}
        self.uses: dict[int, list[Use]] = {}
        self.results: dict[int, dict[tuple[Source, str], Tensor]] = {}
        self.finished: set[int] = set()
        self.hooked: set[int] = set()
        self.owner = Owner()
        self.handles: list[Any] = []
        at_end_of_backward(self.end)

    # ------------------------------------------------------------------------------------------------ nodes that run

    def arrive(self, entries: Sequence[Entry], gradients: tuple[Tensor | None, ...]) -> None:
        losses = [entry for entry in entries if isinstance(entry, LossRecord)]
        for loss in losses:
            self._loss(loss, gradients[loss.output_nr])
        if not losses:
            self._survey(entries)
        for entry in reversed(entries):
            if isinstance(entry, Record):
                self._record(entry, gradients[entry.output_nr])
            else:
                self._hook(entry)
        if not self.keep:
            _release([entry for entry in entries if not isinstance(entry, Record) or not self._wanted_of(entry)])

    def _loss(self, loss: LossRecord, gradient: Tensor | None) -> None:
        """Start curvature; the walk from the loss serves first-order features, too."""
        if loss.edge is None or gradient is None:
            return
        reduction = loss.options.get("reduction", "mean")
        self.reductions.add(reduction)
        plan = walk([loss.edge], self._wanted)
        self.surveyed |= plan.nodes
        if len(self.reductions) > 1:
            self._refuse_table5("of any layer")
        layers = [record.definition for record in plan.records]
        curved = self.demand.features(layers, *CURVATURE)
        with torch.no_grad():
            if curved:
                curvature.check_loss(loss, curved)
            samples = loss.input_shape[0] if curved else None
            start = {loss.edge: loss.input_shape}
            flags = survey.check(plan, self.context, start, samples)
            self._one_batch(plan.records)
            self._expect(plan.records)
            self.flags += flags
            if curved:
                begin = curvature.Start(loss, gradient)
                curvature.check_plan(plan, self.demand, begin.samples)
                self.flags += begin.flags(curved)
                self.context.log(f"{loss.where}: {', '.join(curved)} over {len(plan.steps)} nodes")
                curvature.run(begin, plan, self.demand, self._accumulate)

    def _survey(self, entries: Sequence[Entry]) -> None:
        """Walk below a node that no walk has met yet: one that lies below no extended loss."""
        node = current_node()
        if node in self.surveyed or self._known(entries):
            return
        shapes = node_outputs(node)
        start: dict[Edge, Sequence[int]] = {(node, number): shape for number, (shape, _, _) in enumerate(shapes)}
        plan = walk(start, self._wanted)
        self._refuse_without_loss(
            [step.record for step in plan.steps if step.record and step.node not in self.surveyed]
        )
        self.surveyed |= plan.nodes
        marks = [entry for entry in entries if isinstance(entry, Mark)]
        flags = survey.check(plan, self.context, start, None, marks)
        self._one_batch(plan.records)
        self._expect(plan.records)
        self.flags += flags

    def _known(self, entries: Sequence[Entry]) -> bool:
        """Whether the node is a reshaping layer's that a walk went past."""
        record = next((entry for entry in entries if isinstance(entry, Record)), None)
        return (
            record is not None and not record.parameters and record.edge is not None and record.edge[0] in self.surveyed
        )

    def _one_batch(self, records: Sequence[Record]) -> None:
        for record in records:
            self.samples = record.samples if self.samples is None else self.samples
            if record.samples != self.samples:
                raise BatchAxisLost(record.where, record.output_shape, self.samples)

    def _expect(self, records: Sequence[Record]) -> None:
        for record in records:
            self.expected.update({id(parameter): record for parameter in self._wanted_of(record).values()})

    def _record(self, record: Record, delta: Tensor | None) -> None:
        """Keep δ until the parameters of the layer have been reached by all their uses."""
        wanted = self._wanted_of(record)
        if not wanted:
            self._hook(record)
            return
        if delta is None:
            parameter = next(iter(wanted.values()))
            delta = torch.zeros(record.output_shape, dtype=parameter.dtype, device=parameter.device)
        factor = at_output(record, delta[None], lead=1)
        for name, parameter in wanted.items():
            if id(parameter) not in self.uses:
                self.parameters[id(parameter)] = parameter
                self.uses[id(parameter)] = []
                complete = partial(self._complete, id(parameter))
                self.handles.append(accumulator(parameter).register_prehook(complete))
            self.uses[id(parameter)].append(Use(record, name, factor))

    def _refuse_without_loss(self, records: Sequence[Record]) -> None:
        """This part of the graph lies below no extended loss."""
        for record in records:
            layer = record.definition
            for name in self._wanted_of(record):
                curved = [
                    e.name for e in self._extensions(layer, name) if any(need.curvature for need in e.needs(layer))
                ]
                if curved:
                    raise LossNotExtended(record.where, name, curved, [loss.name for loss in registry().losses])
                self._refuse_table5(name)

    def _refuse_table5(self, name: str) -> None:
        for extension in self.demand.extensions:
            if extension.scaling == "table5":
                raise UnitUnknown(name, extension.name)

    # ------------------------------------------------------------------------------------------------- parameters

    def _complete(self, key: int, gradients: tuple[Tensor | None, ...]) -> None:
        """Pre-hook of the node that accumulates a parameter's gradient."""
        device = self.parameters[key].device.type
        with torch.autocast(device, enabled=False):
            self._finish(key)

    def _finish(self, key: int) -> None:
        """Set the fields of a parameter, then run the hooks of the modules that are complete with it."""
        uses = self.uses.pop(key, None)
        if uses is None:
            return
        parameter, results = self.parameters.pop(key), self.results.pop(key, {})
        # Only fields that are asked to be differentiable keep a graph.
        graph = torch.is_grad_enabled()
        with torch.set_grad_enabled(graph and any(e.differentiable for e in self.demand.extensions)):
            results |= self._at_once(uses)
        sizes = Sizes(uses[0].record.samples, self._unit(uses[0].record.samples))
        self.owner.lend([parameter, *(use.factor for use in uses if use.factor is not None)])
        self.owner.lend([tensor for use in uses for tensor in use.record.tensors.values()])
        for extension in self._extensions(uses[0].layer, uses[0].name):
            with torch.set_grad_enabled(graph and extension.differentiable):
                q = self._quantities(extension, uses, results)
                self.owner.set(parameter, extension.field, extension.value(q, sizes))
        self.context.log(f"{uses[0].record.where}, parameter {uses[0].name!r}: fields set")
        self.finished.add(key)
        for use in uses:
            if all(id(parameter) in self.finished for parameter in self._wanted_of(use.record).values()):
                self._hook(use.record)
                if not self.keep:
                    use.record.release()

    def _at_once(self, uses: list[Use]) -> dict[tuple[Source, str], Tensor]:
        """The quantities of δ, and those of the input alone."""
        names = self._names(uses, GRADIENT)
        differentiable = torch.is_grad_enabled()
        found = {(GRADIENT, n): t for n, t in quantities(uses, names, differentiable=differentiable).items()}
        with torch.no_grad():
            bare = [Use(use.record, use.name) for use in uses]
            found |= {(INPUT, n): t for n, t in quantities(bare, self._names(uses, INPUT)).items()}
        return found

    def _names(self, uses: list[Use], source: Source) -> list[str]:
        return list(dict.fromkeys(name for use in uses for name in self.demand.quantities(use.layer, source)))

    def _quantities(
        self, extension: Extension, uses: list[Use], results: dict[tuple[Source, str], Tensor]
    ) -> dict[str, Tensor]:
        """What the feature asked for, by name; residuals that never arose are absent."""
        keys = {need.quantity: (source(extension, need), need.quantity) for need in extension.needs(uses[0].layer)}
        q = {name: results[key] for name, key in keys.items() if key in results}
        return q if torch.is_grad_enabled() else {name: tensor.detach() for name, tensor in q.items()}

    def _extensions(self, layer: Layer, name: str) -> list[Extension]:
        """The features that have a value for a parameter."""
        offered = layer.parameters[name]
        return [e for e in self.demand.extensions if any(need.quantity in offered for need in e.needs(layer))]

    def _unit(self, samples: int) -> float | None:
        if len(self.reductions) != 1:
            return None
        return float(samples) if "mean" in self.reductions else 1.0

    def _accumulate(self, parameter: Tensor, source: Source, found: dict[str, Tensor]) -> None:
        results = self.results.setdefault(id(parameter), {})
        for name, tensor in found.items():
            before = results.get((source, name))
            results[source, name] = tensor if before is None else before + tensor

    def _wanted(self, parameter: Tensor) -> bool:
        key = id(parameter)
        if key not in self.wanted_cache:
            self.wanted_cache[key] = parameter.requires_grad and computes_gradient_of(parameter)
        return self.wanted_cache[key]

    def _wanted_of(self, record: Record) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in record.trainable().items() if self._wanted(parameter)}

    def _hook(self, entry: Mark) -> None:
        """Call the user's hook, once for each leaf module."""
        module, hook = entry.module(), self.context.extension_hook
        if hook is None or module is None or id(module) in self.hooked:
            return
        if type(entry) is not Mark or _is_leaf(module):
            self.hooked.add(id(module))
            hook(module)

    # ------------------------------------------------------------------------------------------------------ the end

    def end(self) -> None:
        """Autograd is done. Under `autograd.grad` it accumulates nothing, so parameters are finished here."""
        try:
            for key in list(self.uses):
                self._complete(key, ())
            error = first_raised(self.flags)
            if error is not None:
                self.owner.take_back()
                raise error
            for key, record in self.expected.items():
                if key not in self.finished:
                    name = next(n for n, parameter in record.trainable().items() if id(parameter) == key)
                    raise FieldMissing(record.where, name, self.demand.names)
        finally:
            self.clean_up()
            self.context.passes.pop(self.task, None)

    def clean_up(self) -> None:
        """Leave nothing behind: pre-hooks on parameters live as long as the parameters."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.uses.clear()
        self.results.clear()
        self.parameters.clear()
        self.surveyed.clear()


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None
