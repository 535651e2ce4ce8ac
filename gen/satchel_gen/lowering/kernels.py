"""Which rules get a Triton kernel, and of which shape. A plain product or sum goes to the vendor's library instead.

- an elementwise rule is a `Pointwise` program;
- a contraction whose operands are squared on load, or whose result is squared before it is accumulated, a `Contraction`;
- Σ_{r,r'} of two Gram matrices, a `Gram`; a squared sum of one tensor, a `Reduce`; a loss over classes, a `Row`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from sympy import Expr, Indexed

from ..calculus.terms import Term
from ..formula import render, render_formula
from ..notation import Index, IndexSum, LogSumExp, base_name, index_atoms, reads
from .losses import LossRule, LoweredLoss
from .plan import Axes, Contract, Leaf, Map, Node, leaves
from .programs import Contraction, Gram, Pointwise, Program, Read, Reduce, Row, Stage
from .rules import LoweredLayer, LoweredRule
from .squares import Variant


@dataclass(frozen=True)
class KernelRule:
    """A rule on the Triton backend. With `separated`, axes `unit` of extent 1 take that program (or plain ATen) instead."""

    rule: LoweredRule
    program: Program
    separated: Variant | None = None
    separated_program: Contraction | None = None
    operands: tuple[Node, ...] = ()  # what the separated program reads


def layer_kernels(layer: LoweredLayer) -> list[KernelRule]:
    found = (_kernel(rule) for rule in layer.rules)
    return [kernel for kernel in found if kernel is not None]


def _kernel(rule: LoweredRule) -> KernelRule | None:
    if rule.stages or rule.numbers or len(rule.formula.terms) > 1 or any(leaf.windows for leaf in _leaves(rule)):
        return None
    (term,) = rule.formula.terms
    if term.square is not None and term.square.centred is not None:
        return None
    if (
        term.square is not None
        and not _is_matrix_product(term.square)
        and reads(term.square.factor) != [term.square.factor]
    ):
        return None
    if len(rule.variants) > 1:
        return _squared_product(rule)
    (variant,) = rule.variants
    tree = variant.tree
    doc = render_formula(rule.formula)
    if isinstance(tree, Map) and rule.operands and not term.deltas and not term.sums:
        accesses = {read: Read(str(read.base), names(read.indices)) for read in reads(term.factor)}
        ordered = tuple(dict.fromkeys(accesses[r] for name in rule.arguments for r in accesses if str(r.base) == name))
        expr = term.factor.xreplace({r: sympy.Symbol(str(r.base), real=True) for r in accesses})
        return KernelRule(
            rule, Pointwise(name=rule.name, doc=doc, out=names(rule.formula.axes), reads=ordered, expr=expr)
        )
    if isinstance(tree, Contract) and any(map(_is_square, (tree.left, tree.right))):
        program = _contraction(rule, rule.name, doc, tree)
        return KernelRule(rule, program) if program is not None else None
    if term.square is not None and len([i for i in reads(term.square.factor)[0].indices if i.name not in "vn"]) <= 2:
        return KernelRule(rule, _squared_sum(rule, doc))
    return None


def _is_matrix_product(term: Term) -> bool:
    """Whether a term is a sum of products of two tensors, each with an axis of its own."""
    parts = sympy.Mul.make_args(term.factor)
    if len(parts) != 2 or not all(isinstance(part, Indexed) for part in parts):
        return False
    own = [index_atoms(part) - term.sums for part in parts]
    return bool(own[0] - own[1]) and bool(own[1] - own[0] - {Index("n")})


def _leaves(rule: LoweredRule) -> list[Leaf]:
    return [leaf for variant in rule.variants for leaf in leaves(variant.tree)]


def _squared_product(rule: LoweredRule) -> KernelRule:
    (term,) = rule.formula.terms
    assert term.square is not None
    doc = render_formula(rule.formula)
    separated = next(v for v in rule.variants if v.name == "separated")
    inner = reads(term.square.factor)
    first, second = (next(r for r in inner if str(r.base) == name) for name in rule.arguments if name != "sign")
    a, b = (Read(str(r.base), names(r.indices)) for r in (first, second))
    program: Program
    if any(v.name == "gram" for v in rule.variants):
        (rows,) = term.square.sums
        outer = tuple(i.name for i in first.indices if i in term.sums and i.name == "v")
        program = Gram(
            name=f"{rule.name}_gram", doc=doc, out=names(rule.formula.axes), a=a, b=b, rows=rows.name, outer=outer
        )
        return KernelRule(rule, program, separated)
    weight = next((Read(str(r.base), names(r.indices)) for r in reads(term.factor)), None)
    program = Contraction(
        name=f"{rule.name}_fused",
        doc=doc,
        out=names(rule.formula.axes),
        a=a,
        b=b,
        sums=tuple(i.name for i in first.indices if i in term.square.sums),
        accumulate=tuple(i.name for i in first.indices if i in term.sums),
        square_epilogue=True,
        weight=weight,
        signature=tuple(rule.arguments),
    )
    tree = separated.tree
    if not isinstance(tree, Contract):  # nothing is summed after the square: no product of matrices
        return KernelRule(rule, program, separated)
    apart = _contraction(rule, f"{rule.name}_separated", doc, tree, given=True)
    return KernelRule(rule, program, separated, apart, (tree.left, tree.right))


def _contraction(rule: LoweredRule, name: str, doc: str, tree: Contract, given: bool = False) -> Contraction | None:
    """A product with operands squared on load. `given`: other operands are computed before and passed by name."""
    operands = []
    for k, node in enumerate((tree.left, tree.right)):
        if isinstance(node, Leaf) or _is_square(node):
            operands.append(Read(leaves(node)[0].name, names(node.axes), square=_is_square(node)))
        elif given:
            operands.append(Read(("total", "product")[k], names(node.axes)))
        else:
            return None
    a, b = operands
    sums = tuple(i.name for i in tree.left.axes if i in tree.over)
    signature = () if given else tuple(rule.arguments)
    return Contraction(name=name, doc=doc, out=names(rule.formula.axes), a=a, b=b, sums=sums, signature=signature)


def _is_square(node: Node) -> bool:
    return (
        isinstance(node, Map)
        and len(node.reads) == 1
        and node.expr == node.reads[0] ** 2
        and isinstance(node.children[0], Leaf)
    )


def _squared_sum(rule: LoweredRule, doc: str) -> Reduce:
    (term,) = rule.formula.terms
    assert term.square is not None
    (read,) = reads(term.square.factor)
    weight = next((Read(str(r.base), names(r.indices)) for r in reads(term.factor)), None)
    return Reduce(
        name=rule.name,
        doc=doc,
        out=names(rule.formula.axes),
        read=Read(str(read.base), names(read.indices)),
        inner=tuple(i.name for i in read.indices if i in term.square.sums),
        square=True,
        outer=tuple(i.name for i in read.indices if i in term.sums),
        weight=weight,
        signature=tuple(rule.arguments),
    )


def loss_kernels(loss: LoweredLoss) -> list[Program]:
    """The programs of the loss's rules that have one: no numbers of the module, and no condition on an intermediate."""
    found = (_loss_kernel(loss, rule) for rule in loss.rules if rule.expr != 0 and not rule.numbers)
    return [program for program in found if program is not None]


def _loss_kernel(loss: LoweredLoss, rule: LossRule) -> Program | None:
    equal = {i.name: base_name(i) for i in rule.axes if i in loss.columns}
    doc = f"{rule.name}[{', '.join(names(rule.axes))}] = {render(rule.expr)}"
    signature = tuple(str(t.base) for t in (*rule.explicit, *rule.operands))
    stages: dict[str, LogSumExp | IndexSum] = {}
    expr = rule.expr
    for statement in reversed(rule.intermediates):
        if isinstance(statement.value, LogSumExp | IndexSum):
            stages = {statement.name: statement.value, **stages}
            continue
        for read in [r for r in reads(expr) if str(r.base) == statement.name]:
            if any(condition.has(read) for condition in expr.atoms(sympy.core.relational.Relational)):
                return None  # SymPy would solve it for another variable, which rounds differently
            expr = expr.xreplace({read: statement.value.xreplace(dict(zip(statement.axes, read.indices, strict=True)))})
    accesses, symbols = _program_reads((expr, *(value.body for value in stages.values())), list(stages), rule, loss)
    expr = expr.xreplace(symbols)
    common = {
        "name": rule.name,
        "doc": doc,
        "out": names(rule.axes),
        "equal": equal,
        "columns": rule.columns,
        "signature": signature,
        "reads": accesses,
        "expr": expr,
    }
    if not stages:
        return Pointwise(**common)
    rows = {index for value in stages.values() for index in value.over}
    if len(rows) > 1:
        return None
    kinds = {LogSumExp: "logsumexp", IndexSum: "sum"}
    reductions = tuple(Stage(name, kinds[type(value)], value.body.xreplace(symbols)) for name, value in stages.items())
    return Row(**common, row=rows.pop().name, stages=reductions)


def _program_reads(
    exprs: Sequence[Expr], stages: list[str], rule: LossRule, loss: LoweredLoss
) -> tuple[tuple[Read, ...], dict[Indexed, sympy.Symbol]]:
    """The accesses of a loss's rule, its input at the output's own indices first; a second access has a name of its own."""
    own = names(loss.loss.input.indices)
    found: list[Read] = []
    symbols: dict[Indexed, sympy.Symbol] = {}
    accesses = {read for expr in exprs for read in reads(expr)}
    present = {str(read.base) for read in accesses}
    accesses |= {operand for operand in rule.operands if str(operand.base) not in present}  # for its extents
    ordered = sorted(
        accesses, key=lambda r: (str(r.base) != str(loss.loss.input.base), names(r.indices) != own, str(r))
    )
    for read in ordered:
        name = str(read.base)
        if name in stages:
            symbols[read] = sympy.Symbol(name, real=True)
            continue
        alias = f"{name}_column" if any(r.tensor == name for r in found) else ""
        found.append(Read(name, names(read.indices), alias=alias))
        symbols[read] = sympy.Symbol(alias or name, real=True)
    return tuple(found), symbols


def names(axes: Axes) -> tuple[str, ...]:
    return tuple(i.name for i in axes)
