"""Context of loss.py.jinja."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from sympy import Expr

from ..definitions.distributions import Distribution, NoDistribution
from ..definitions.model import Classes
from ..formula import render
from ..lowering.losses import LossRule, LoweredLoss
from ..lowering.programs import Program
from ..notation import Extent, base_name
from .contexts import RuleContext, Stated, axis_names, module_name
from .functions import Function, divisor_function, loss_function, radicand_function, sample_function


@dataclass(frozen=True)
class LossContext(Stated):
    name: str
    module: str
    formulas: tuple[str, ...]
    notes: tuple[str, ...]
    kernels: str
    input_axes: tuple[str, ...]
    target_axes: tuple[str, ...]
    operands: Mapping[str, tuple[str, ...]]
    arguments: tuple[str, ...]
    elements: tuple[str, ...]
    columns: tuple[str, ...]
    functions: tuple[Function, ...]
    sample: Function | None
    sampler: str
    rules: Mapping[str, RuleContext]
    reductions: Mapping[str, RuleContext | tuple[str, ...]]
    no_likelihood: str
    classes: bool
    numbers: tuple[str, ...]
    when: str
    options: str


def loss_context(lowered: LoweredLoss, programs: Collection[Program]) -> LossContext:
    loss = lowered.loss
    functions: list[Function] = []
    fused = {program.name for program in programs}

    def context(function: Function, operands: tuple[str, ...], numbers: Iterable[str]) -> RuleContext:
        functions.append(function)
        name = function.name
        return RuleContext(name, (*operands, *numbers), name if name in fused else None)

    def of(rule: LossRule, function: Function) -> RuleContext:
        return context(function, tuple(str(t.base) for t in rule.operands), (o.attribute for o in rule.numbers))

    rules = {rule.name: of(rule, loss_function(rule)) for rule in lowered.rules}
    if lowered.null is not None:
        rules["null"] = of(lowered.null, loss_function(lowered.null))
    known: dict[Expr, RuleContext] = {}
    for factor, rule in lowered.radicands.items():
        if rule.expr not in known:
            known[rule.expr] = of(rule, radicand_function(rule))
        rules[f"{factor}_undefined"] = known[rule.expr]
    reductions: dict[str, RuleContext | tuple[str, ...]] = {}
    for name, divisor in loss.reductions.items():
        reductions[name] = (
            of(lowered.divisors[name], divisor_function(lowered.divisors[name]))
            if name in lowered.divisors
            else tuple(str(e.args[0]) for e in sorted(divisor.atoms(Extent), key=str))
        )
    sample = sample_function(lowered)
    if sample is not None and lowered.sample is not None:
        operands = tuple(str(t.base) for t in lowered.sample.operands)
        rules["sample"] = RuleContext("sample", (*operands, *sample.numbers), None)
    drawn = loss.distribution
    return LossContext(
        name=loss.name,
        module=loss.module,
        formulas=tuple(str(s) for s in loss.statements),
        notes=tuple(_loss_notes(lowered)),
        kernels=module_name(loss) if programs else "",
        input_axes=axis_names(loss.input.indices),
        target_axes=axis_names(loss.target.indices),
        operands={str(t.base): axis_names(t.indices) for t in loss.operands},
        arguments=loss.arguments,
        elements=tuple(i.name for i in loss.terms.indices),
        columns=tuple(base_name(i) for i in lowered.columns),
        functions=tuple(functions),
        sample=sample,
        sampler=drawn.sampler if isinstance(drawn, Distribution) else "",
        rules=rules,
        reductions=reductions,
        no_likelihood=drawn.reason if isinstance(drawn, NoDistribution) else "",
        classes=isinstance(loss.domain, Classes),
        numbers=lowered.numbers,
        when=repr(dict(loss.when)),
        options=repr(dict(loss.options)),
    )


def _loss_notes(lowered: LoweredLoss) -> Iterator[str]:
    """What a reader must know of the curvature that starts here."""
    loss, derived = lowered.loss, lowered.derived
    if not derived.hessian:
        yield "∇²ℓ = 0: the features of the exact Gauss-Newton matrix are zero."
    if derived.exact.null is not None:
        yield f"The exact factor maps a unit vector over {derived.exact.mixed} to zero, {render(derived.exact.null)}."
    if isinstance(loss.distribution, NoDistribution):
        yield f"No negative log-likelihood: {loss.distribution.reason}. Monte-Carlo features refuse it."
        return
    weight = "" if loss.weight == 1 else f", weighted by {render(loss.weight)}"
    relation = "which is ∇²ℓ" if derived.fisher else "which is not ∇²ℓ"
    yield f"Monte-Carlo features estimate the Fisher of {loss.distribution}{weight}, {relation}."
