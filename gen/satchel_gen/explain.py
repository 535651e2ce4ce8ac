"""The derivation of a rule, step by step, from the definition to the emitted function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import sympy

from .calculus.instantiate import Instance
from .definitions import DefinitionError, Definitions, Feature, Layer, Loss
from .definitions import quantities as Q
from .emit.functions import Function, loss_function, rule_functions, sample_function
from .emit.package import format_files
from .emit.triton import environment
from .formula import render, render_formula, render_term
from .lowering.kernels import KernelRule, layer_kernels, loss_kernels
from .lowering.losses import lower_loss
from .lowering.programs import Program
from .lowering.rules import LoweredRule, lower_layer
from .lowering.traffic import Traffic, launched, of_feature, of_kernel, of_torch, of_triton, passes_of
from .notation import Index, base_name

_ANY: Mapping[str, int] = MappingProxyType({})
_QUANTITIES = {q.name: q for q in (*Q.PASSES, *Q.PULLBACKS, *Q.OUTPUT_FACTORS, *Q.INPUT_FACTORS, Q.BLOCK)}


@dataclass(frozen=True)
class Part:
    text: str
    heading: bool = False
    code: bool = False


def explain(
    definitions: Definitions, name: str, feature_name: str = "", sizes: Mapping[str, int] = _ANY
) -> Iterator[Part]:
    """Headings, formulas and code, in the order in which they follow from each other; traffic in bytes where `sizes` say the extents.

    Raises DefinitionError for unknown names.
    """
    known: dict[str, Layer | Loss] = {layer.name: layer for layer in definitions.layers}
    known |= {loss.name: loss for loss in definitions.losses}
    features = {f.name: f for f in definitions.features}
    if name not in known:
        raise DefinitionError(f"no layer or loss {name!r}; defined are {', '.join(known)}")
    if feature_name and feature_name not in features:
        raise DefinitionError(f"no feature {feature_name!r}; defined are {', '.join(features)}")
    definition = known[name]
    yield Part(f"{name}, defined in {definition.source.file.name}:{definition.source.line}", heading=True)
    for statement in definition.statements:
        yield Part(f"  {statement}")
    chosen = [features[feature_name]] if feature_name else list(features.values())
    if isinstance(definition, Loss):
        yield from _loss(definition, sizes)
    else:
        yield from _layer(definition, chosen, sizes)


def _layer(layer: Layer, chosen: list[Feature], sizes: Mapping[str, int]) -> Iterator[Part]:
    yield Part("\nJacobians: deltas that stay unsolved are the structure", heading=True)
    for wrt in (layer.input, *layer.parameters):
        yield Part(f"  {_jacobian(layer, wrt)}")
        structure = Instance(layer, wrt).structure
        if structure is not None:
            outer, inner, block, shared = map(
                _names, (structure.outer, structure.inner, structure.block, structure.shared)
            )
            text = f"output factor over {outer}, input factor over {inner}, shared axes {shared}, blocks over {block}"
            yield Part(f"    Kronecker: {text}")
        elif wrt is not layer.input:
            yield Part("    no Kronecker structure: the exact block")
    lowered = lower_layer(layer)
    kernels = {kernel.rule.name: kernel for kernel in layer_kernels(lowered)}
    for feature in chosen:
        yield Part(f"\n{feature.name}: {feature.formula}", heading=True)
        for name in passes_of(feature):
            rule = lowered.passes[name]
            if rule is not None:
                yield from _rule(rule, kernels, sizes)
            elif name in ("residual", "hessian"):
                yield Part(f"  {name}: none")
            else:
                yield Part(f"  {name}: composed from vjp by the engine")
        for quantities in feature.needs.values():
            for parameter in lowered.parameters.values():
                for quantity in quantities:
                    if quantity.name in parameter:
                        yield from _rule(parameter[quantity.name], kernels, sizes)
        for backend, traffic in of_feature(lowered, feature, kernels.values(), sizes).items():
            yield Part(f"  {feature.name}, {backend}: {_cost(traffic, sizes)}")


def _names(axes: tuple[Index, ...]) -> str:
    return ", ".join(base_name(i) for i in axes) or "none"


def _jacobian(layer: Layer, wrt: sympy.Indexed) -> str:
    instance = Instance(layer, wrt)
    at = tuple(sympy.Symbol(f"{i.name}′") for i in instance.output_axes)
    inner = [type(i)(f"{i.name}′", i.many) for i in instance.output_axes]
    parts = instance._jacobian([(instance.batch,), tuple(inner), instance.wrt_axes])
    left = ", ".join(map(str, (instance.batch, *at)))
    return f"∂{layer.output.base}[{left}] / ∂{render(wrt)} = {' + '.join(map(render_term, parts))}"


def _cost(traffic: Traffic, sizes: Mapping[str, int]) -> str:
    launches = f"{traffic.launches} launch{'es' if traffic.launches != 1 else ''}"
    elements = traffic.at(sizes)
    moved = f"{4 * int(elements) / 1e6:,.2f} MB of float32" if elements.is_Integer else f"{render(elements)} elements"
    return f"{launches}, {moved}"


def _kernel(program: Program, traffic: Traffic, sizes: Mapping[str, int]) -> Part:
    """The kernel of a rule, and how often it reads its tensors."""
    kind = f"{type(program).__name__} program {program.name}"
    return Part(f"    Triton: {kind}: {_cost(traffic, sizes)}; {program.reuse}")


def _rule(rule: LoweredRule, kernels: dict[str, KernelRule], sizes: Mapping[str, int]) -> Iterator[Part]:
    quantity = _QUANTITIES.get(rule.quantity)  # none for what is derived along the statements: a Hessian's product
    yield Part(f"\n  {render(quantity.value) if quantity is not None else rule.quantity}")
    yield Part(f"  → {render_formula(rule.formula)}")
    for variant in rule.variants:
        if variant.name:
            unit = f", where {', '.join(i.name.upper() for i in variant.unit)} = 1" if variant.unit else ""
            yield Part(f"    {variant.name}: {sympy.sstr(variant.flops)} FLOPs{unit}")
    yield Part(f"    PyTorch: {_cost(of_torch(rule, sizes), sizes)}")
    kernel = kernels.get(rule.name)
    program = launched(kernel, sizes) if kernel is not None else None
    if program is not None:
        yield _kernel(program, of_triton(rule, kernel, sizes), sizes)
    for function in rule_functions(rule):
        yield Part(code(function), code=True)


def code(function: Function) -> str:
    """The function as its template prints it."""
    template = environment().from_string('{% from "functions.jinja" import function %}{{ function(f) }}')
    return format_files({"code.py": template.render(f=function)})["code.py"]


def _loss(loss: Loss, sizes: Mapping[str, int]) -> Iterator[Part]:
    lowered = lower_loss(loss)
    programs = {program.name: program for program in loss_kernels(lowered)}
    derived = lowered.derived
    yield Part("\nHessian at the data", heading=True)
    yield Part("  " + (" + ".join(map(render_term, derived.hessian)) or "0").replace("+ −", "− "))
    yield Part("\nExact factor, checked: S Sᵀ = ∇²ℓ", heading=True)
    yield Part(f"  S = {render(derived.exact.value)}")
    if derived.exact.null is not None:
        yield Part(f"  null vector over {derived.exact.mixed}: {render(derived.exact.null)}")
    yield Part("\nEmitted functions", heading=True)
    for rule in lowered.rules:
        yield Part(code(loss_function(rule)), code=True)
        if rule.name in programs:
            yield _kernel(programs[rule.name], of_kernel(programs[rule.name]), sizes)
    sample = sample_function(lowered)
    yield Part(f"  sample: {sample.formula if sample is not None else 'none, the loss is no likelihood'}")
