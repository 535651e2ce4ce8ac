"""What a rule and a feature cost on each backend, from their programs: launches, and elements that these read and write.

`sizes` are the extents that are known; the programs for all shapes are taken where they do not say that a special one is valid.
What few tiles or blocks need besides, to fill a device, is left out: their work is split, each part reads what all share, and
one more launch adds the parts of a sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy
from sympy import Expr

from ..definitions import Feature
from ..definitions import quantities as Q
from .composed import Stage
from .kernels import KernelRule
from .plan import Leaf, Node, calls, elements_moved, size
from .programs import Program
from .rules import LoweredLayer, LoweredRule
from .squares import Variant

Sizes = Mapping[str, int]
#: What passes a layer, by the source of the columns; Jᵀv for all others.
_PASSES = {
    "gradient": (),
    "input": (),
    "residual": ("vjp", "residual", "hessian"),
    "diagonal": ("diagonal",),
    "averaged": ("mean_vjp", "sandwich"),
}
_TILE = {"BLOCK_M": 64, "BLOCK_N": 64}


@dataclass(frozen=True)
class Traffic:
    launches: int = 0
    elements: Expr = sympy.S.Zero

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.launches + other.launches, self.elements + other.elements)

    def at(self, sizes: Sizes) -> Expr:
        """The elements, with the sizes that are known; tiles are as large as where none was tuned."""
        known = {**_TILE, **sizes} if sizes else {}
        return self.elements.subs({s: known[s.name] for s in self.elements.free_symbols if s.name in known})


def of_kernel(program: Program) -> Traffic:
    loaded = [program.loads(read) * program.extent(read.walked) for read in program.all_reads]
    return Traffic(1, sympy.Add(*loaded, program.extent(program.out)))


def of_torch(rule: LoweredRule, sizes: Sizes) -> Traffic:
    """What stays in cache counts as well."""
    variant = next(variant for variant in rule.variants if _valid(variant, sizes))
    return sum(map(_of_stage, rule.stages), _of_trees(variant.trees))


def _of_stage(stage: Stage) -> Traffic:
    if stage.logsumexp is None:
        return _of_trees([stage.tree] if stage.tree is not None else [])
    axes = stage.formula.axes
    return Traffic(1, size(axes) + size((*axes, *stage.logsumexp.over)))


def _of_trees(nodes: Sequence[Node]) -> Traffic:
    return Traffic(sum(map(calls, nodes)), sympy.Add(*map(elements_moved, nodes)))


def _valid(variant: Variant, sizes: Sizes) -> bool:
    return all(sizes.get(index.name.upper()) == 1 for index in variant.unit)


def of_triton(rule: LoweredRule, kernel: KernelRule | None, sizes: Sizes) -> Traffic:
    """Of the kernel, after the operations that compute its operands; a rule without one runs as on PyTorch."""
    program = launched(kernel, sizes) if kernel is not None else None
    if kernel is None or program is None:
        return of_torch(rule, sizes)
    separated = kernel.separated_program
    if separated is None or program is not separated:
        return of_kernel(program)
    given = zip((separated.a, separated.b), kernel.operands, strict=True)
    before = [node for read, node in given if not (read.square or isinstance(node, Leaf))]
    return of_kernel(separated) + _of_trees(before)


def launched(kernel: KernelRule, sizes: Sizes) -> Program | None:
    """The program that a rule takes at these sizes; None: that of PyTorch."""
    if kernel.separated is not None and _valid(kernel.separated, sizes):
        return kernel.separated_program
    return kernel.program


def of_feature(
    lowered: LoweredLayer, feature: Feature, kernels: Iterable[KernelRule], sizes: Sizes
) -> dict[str, Traffic]:
    """By backend: what a pass of one layer takes."""
    known = {kernel.rule.name: kernel for kernel in kernels}
    rules = feature_rules(lowered, feature)
    return {
        "PyTorch": sum((of_torch(rule, sizes) for rule in rules), Traffic()),
        "Triton": sum((of_triton(rule, known.get(rule.name), sizes) for rule in rules), Traffic()),
    }


def passes_of(feature: Feature) -> tuple[str, ...]:
    """The quantities by which a feature's columns pass a layer."""
    return tuple(dict.fromkeys(name for source in feature.needs for name in _PASSES.get(source, (Q.VJP.name,))))


def feature_rules(lowered: LoweredLayer, feature: Feature) -> list[LoweredRule]:
    """What a feature runs: the rules that pass the layer, then those of each parameter, Kronecker factors as the layer has them."""
    found = [rule for name in passes_of(feature) if (rule := lowered.passes[name]) is not None]
    wanted = {q.name for quantities in feature.needs.values() for q in quantities}
    if isinstance(feature.value, Mapping):
        factors = feature.value.get(lowered.layer.approximation, next(iter(feature.value.values())))
        wanted = {q.name for q in (*factors, *([feature.block] if feature.block else []))}
    return found + [rule for rules in lowered.parameters.values() for name, rule in rules.items() if name in wanted]
