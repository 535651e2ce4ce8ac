"""Which rules get a Triton kernel, and of which shape. A plain product or sum goes to the vendor's library instead.

- an elementwise rule is a `Pointwise` program;
- a contraction whose operands are squared on load, or whose result is squared before it is accumulated, a `Contraction`;
- Σ_{r,r'} of two Gram matrices, a `Gram`; a squared sum of one tensor, a `Reduce`; a loss over classes, a `Row`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
from sympy import Expr, Indexed

from ..calculus.instantiate import Formula
from ..calculus.terms import Term
from ..formula import render, render_formula
from ..notation import Equal, Index, IndexSum, LogSumExp, base_name, index_atoms, reads
from .composed import Stage as Intermediate
from .losses import LossRule, LoweredLoss
from .plan import Axes, Contract, Leaf, Map, Node, Window, leaf, leaves
from .programs import Contraction, Gram, Pointwise, Program, Read, Reduce, Resident, Row, Stage
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
    if rule.stages:
        rows = _resident(rule)
        return KernelRule(rule, rows) if rows is not None else None
    if _is_elementwise(rule):
        return _pointwise(rule)
    if any(term.square is not None and term.square.centred is not None for term in rule.formula.terms):
        return None
    if any(leaf.windows for leaf in _leaves(rule)):
        product = _windowed(rule)
        return KernelRule(rule, product) if product is not None else None
    if rule.numbers or len(rule.formula.terms) > 1:
        return None
    (term,) = rule.formula.terms
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
    if isinstance(tree, Contract) and any(map(_is_square, (tree.left, tree.right))):
        program = _contraction(rule, rule.name, doc, tree)
        return KernelRule(rule, program) if program is not None else None
    if term.square is not None and len(reads(term.square.factor)) == 1:
        reduction = _squared_sum(rule, doc)
        return KernelRule(rule, reduction) if reduction is not None else None
    return None


def _is_elementwise(rule: LoweredRule) -> bool:
    """Whether every element comes from one element of each tensor, and from more than one tensor."""
    accessed = {read for term in rule.formula.terms for read in reads(term.factor)}
    aligned = len(accessed) == len({read.base for read in accessed})
    simple = all(not (term.sums or term.deltas or term.square or term.factor.has(Equal)) for term in rule.formula.terms)
    return bool(rule.operands) and aligned and simple and not any(leaf.windows for leaf in _leaves(rule))


def _pointwise(rule: LoweredRule) -> KernelRule:
    expr = sympy.Add(*(term.factor for term in rule.formula.terms))
    accesses = {str(read.base): read for read in reads(expr)}
    program = Pointwise(
        name=rule.name,
        doc=render_formula(rule.formula),
        out=names(rule.formula.axes),
        reads=tuple(Read(name, names(accesses[name].indices)) for name in rule.arguments),
        expr=expr.xreplace({read: sympy.Symbol(name, real=True) for name, read in accesses.items()}),
        options=rule.components,
    )
    return KernelRule(rule, program)


def _is_matrix_product(term: Term) -> bool:
    """Whether a term is a sum of products of two tensors, each with an axis of its own."""
    parts = sympy.Mul.make_args(term.factor)
    if len(parts) != 2 or not all(isinstance(part, Indexed) for part in parts):
        return False
    own = [index_atoms(part) - term.sums for part in parts]
    return bool(own[0] - own[1]) and bool(own[1] - own[0] - {Index("n")})


def _leaves(rule: LoweredRule) -> list[Leaf]:
    return [leaf for variant in rule.variants for leaf in leaves(variant.tree)]


def _resident(rule: LoweredRule) -> Resident | None:
    """A rule of named intermediates that are sums over one and the same row, or elementwise."""
    formulas = [*(stage.formula for stage in rule.stages), rule.formula]
    terms = [term for formula in formulas for term in formula.terms]
    sums = {term.sums for term in terms if term.sums}
    sums |= {frozenset(stage.logsumexp.over) for stage in rule.stages if stage.logsumexp is not None}
    if len(sums) != 1 or any(term.deltas or term.square or term.factor.has(Equal) for term in terms):
        return None
    (over,) = sums
    if any({term.sums for term in formula.terms} not in ({over}, {frozenset()}) for formula in formulas):
        return None
    out = names(rule.formula.axes)
    row = tuple(i.name for i in rule.formula.axes if i in over)
    own = {formula.name: formula.axes for formula in formulas}
    accesses = {read for term in terms for read in _bodies(term.factor)}
    layouts = {str(read.base): names(read.indices) for read in accesses}
    apart = len(layouts) < len(accesses) or any(own.get(str(r.base), r.indices) != r.indices for r in accesses)
    partial = any("v" in axes and axes not in (out, out[1:]) for name, axes in layouts.items() if name not in own)
    together = len(row) == len(over) and row == out[out.index(row[0]) :][: len(row)]
    if out[0] != "v" or not together or apart or partial:
        return None
    return Resident(
        name=f"{rule.name}_resident",
        doc="\n    ".join(render_formula(formula) for formula in formulas),
        out=out,
        signature=tuple(rule.arguments),
        options=rule.components,
        reads=tuple(Read(name, layouts[name]) for name in rule.arguments),
        row=row,
        stages=tuple(_staged(stage) for stage in rule.stages),
        expr=_symbolic(rule.formula),
    )


def _bodies(factor: Expr) -> list[Indexed]:
    return reads(factor.body if isinstance(factor, LogSumExp) else factor)


def _staged(stage: Intermediate) -> Stage:
    if stage.logsumexp is not None:
        return Stage(stage.name, "logsumexp", _named(stage.logsumexp.body))
    summed = any(term.sums for term in stage.formula.terms)
    return Stage(stage.name, "sum" if summed else "value", _symbolic(stage.formula))


def _symbolic(formula: Formula) -> Expr:
    """The summand of a formula, tensors and intermediates by name."""
    return _named(sympy.Add(*(term.factor for term in formula.terms)))


def _named(expr: Expr) -> Expr:
    return expr.xreplace({read: sympy.Symbol(str(read.base), real=True) for read in reads(expr)})


def _windowed(rule: LoweredRule) -> Contraction | None:
    """A product with a tensor that is read through windows, squared before or after its sum: neither patches nor individual
    products are stored. A plain product is a convolution, which the vendor's library computes best."""
    (term,) = rule.formula.terms
    product = term if term.square is None else term.square
    parts = sympy.Mul.make_args(product.factor)
    operands = [_operand(part) for part in parts]
    squared = term.square is not None or any(o is not None and o.square for o in operands)
    if not squared or len(operands) != 2 or None in operands:
        return None
    plain, windowed = _on_lattice(*sorted((o for o in operands if o is not None), key=lambda o: len(o.windows)))
    places = {w.place for o in operands if o is not None for w in o.windows}
    if not places <= product.sums or any(w.divisor != 1 for w in windowed.windows):
        return None
    outer = {i.name for i in (term.sums | product.sums) - places}
    steps = {axis for axis in outer if axis == "v" or (axis in plain.walked and axis in windowed.walked)}
    batch = [axis for axis in names(rule.formula.axes) if axis in plain.walked and axis in windowed.walked]
    if len(batch) > 1:  # per sample and group: two batch axes, which a program cannot walk as one
        return None
    weight = term.factor if term.square is not None and term.factor != 1 else None
    return Contraction(
        name=rule.name,
        doc=render_formula(rule.formula),
        out=names(rule.formula.axes),
        a=plain,
        b=windowed,
        sums=tuple(w.place.name for w in windowed.windows),
        accumulate=tuple(i.name for i in next(iter(rule.arguments.values())) if i.name in steps),
        within=tuple(axis for axis in (*plain.walked, *windowed.walked) if axis in outer - steps),
        square_epilogue=term.square is not None,
        weight=None if weight is None else _operand(weight),
        signature=tuple(rule.arguments),
        shapes={name: names(axes) for name, axes in rule.shapes.items()},
        options=rule.components,
    )


def _on_lattice(plain: Read, windowed: Read) -> tuple[Read, Read]:
    """Σ_w a[w] b[(w + p − d·k) / s] as Σ_h b[h] a[s·h + d·k − p]: fractions are zero, and need not be walked."""
    places = tuple(w.place for w in windowed.windows)
    if all(w.divisor == 1 for w in windowed.windows) or plain.axes[-len(places) :] != names(places):
        return plain, windowed
    if any(w.step != 1 for w in windowed.windows):
        return plain, windowed
    one = sympy.Integer(1)
    turned = [Window(w.place, w.axis, w.tap, w.divisor, -w.reach, -w.offset, one) for w in windowed.windows]
    return replace(windowed, windows=()), replace(plain, windows=tuple(turned))


def _operand(part: Expr) -> Read | None:
    """One access of a tensor, perhaps squared."""
    base, exponent = part.as_base_exp()
    if not isinstance(base, Indexed) or exponent not in (1, 2):
        return None
    found = leaf(base)
    return Read(found.name, names(found.stored), square=exponent == 2, windows=found.windows)


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


def _squared_sum(rule: LoweredRule, doc: str) -> Reduce | None:
    """Where the summed axes lie innermost, torch's own sum reads the tensor as fast as memory allows: no kernel."""
    (term,) = rule.formula.terms
    assert term.square is not None
    (read,) = reads(term.square.factor)
    if read.indices[-1] in term.square.sums:
        return None
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
