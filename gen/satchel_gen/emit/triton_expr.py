"""SymPy expressions as Triton: refuses by name what it does not know; powers become products, kinks nested `tl.where`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import sympy
from sympy.logic.boolalg import Boolean
from sympy.printing.precedence import PRECEDENCE, precedence
from sympy.printing.printer import Printer

from ..notation import Equal, Extent

STABLE = frozenset({"expm1", "log1p", "sigmoid", "sign", "softplus", "tanh"})  # in runtime/triton_math.py
BUILTIN = {"Abs": "tl.abs", "erf": "tl.erf", "exp": "tl.exp", "log": "tl.log"}


class UnprintableError(ValueError):
    """An expression holds something that Triton code cannot be printed for."""


@dataclass
class Lines:
    """Statements that a printed expression needs before it, in order, with names that are free in the kernel."""

    taken: set[str]
    statements: list[str] = field(default_factory=list)

    def fresh(self, base: str) -> str:
        candidates: Iterator[str] = (base if k == 1 else f"{base}_{k}" for k in range(1, 1000))
        name = next(candidate for candidate in candidates if candidate not in self.taken)
        self.taken.add(name)
        return name


class TritonPrinter(Printer):
    """Prints one expression over values that are in scope.

    `values` gives the code of each symbol, `axes` that of each axis used in a delta, `extents` that of each extent.
    """

    printmethod = "_triton"

    def __init__(
        self,
        definition: str,
        values: Mapping[str, str],
        axes: Mapping[str, str],
        extents: Mapping[str, str],
        lines: Lines,
    ) -> None:
        super().__init__()
        self.definition = definition
        self.values = dict(values)
        self.axes = axes
        self.extents = extents
        self.lines = lines

    def refuse(self, what: str) -> UnprintableError:
        return UnprintableError(f"definition {self.definition!r}: no Triton code for {what}")

    def statements(self, expr: sympy.Expr, name: str | None = None) -> str:
        """The code of `expr`; common subexpressions become statements, and with `name` so does the value itself."""
        shared, (rest,) = sympy.cse([folded(expr)], symbols=sympy.numbered_symbols("_shared"))
        for symbol, value in shared:
            self.values[symbol.name] = self.bind(value)
        code = self._branch(rest)
        if name is None:
            return code
        self.lines.statements.append(f"{name} = {code}")
        return name

    def bind(self, expr: sympy.Basic) -> str:
        """A new name for the value of `expr`."""
        code = self.doprint(expr)
        function = expr.func.__name__
        argument = expr.args[0] if len(expr.args) == 1 else None
        readable = isinstance(expr, sympy.Function) and isinstance(argument, sympy.Symbol)
        name = self.lines.fresh(f"{function.lower()}_{self.doprint(argument)}" if readable else "t")
        self.lines.statements.append(f"{name} = {code}")
        return name

    def atom(self, expr: sympy.Basic) -> str:
        """The code of `expr` if that is one name, else a new name for it."""
        return str(self.doprint(expr)) if isinstance(expr, sympy.Symbol) else self.bind(expr)

    def parenthesize(self, expr: sympy.Basic, level: int) -> str:
        code = str(self._print(expr))
        return f"({code})" if self.level(expr) < level else code

    @staticmethod
    def level(expr: sympy.Basic) -> int:
        if isinstance(expr, sympy.Rational):
            dyadic = (int(expr.q) & (int(expr.q) - 1)) == 0
            return PRECEDENCE["Add"] if expr < 0 else PRECEDENCE["Atom"] if dyadic else PRECEDENCE["Mul"]
        if isinstance(expr, sympy.Pow):
            return PRECEDENCE["Atom"] if abs(expr.exp) == sympy.Rational(1, 2) else PRECEDENCE["Mul"]
        return int(precedence(expr))

    def emptyPrinter(self, expr: object) -> str:
        raise self.refuse(f"{type(expr).__name__} ({expr})")

    # numbers

    def _print_Integer(self, expr: sympy.Integer) -> str:
        return str(int(expr))

    def _print_Rational(self, expr: sympy.Rational) -> str:
        if int(expr.q) & (int(expr.q) - 1) == 0:
            return repr(float(expr))
        return f"{expr.p} / {expr.q}"

    def _print_Float(self, expr: sympy.Float) -> str:
        return repr(float(expr))

    def _print_NumberSymbol(self, expr: sympy.NumberSymbol) -> str:
        return repr(float(expr))

    def _print_Infinity(self, expr: sympy.Expr) -> str:
        return 'float("inf")'

    def _print_NegativeInfinity(self, expr: sympy.Expr) -> str:
        return '-float("inf")'

    # arithmetic

    def _print_Symbol(self, expr: sympy.Symbol) -> str:
        if expr.name not in self.values:
            raise self.refuse(f"the unbound symbol {expr.name!r}")
        return self.values[expr.name]

    def _print_Add(self, expr: sympy.Add) -> str:
        code = ""
        for term in sorted(expr.as_ordered_terms(), key=lambda term: term.could_extract_minus_sign()):
            if not code:
                code = self.parenthesize(term, PRECEDENCE["Add"])
            elif term.could_extract_minus_sign():
                code += " - " + self.parenthesize(-term, PRECEDENCE["Mul"])
            else:
                code += " + " + self.parenthesize(term, PRECEDENCE["Add"])
        return code

    def _print_Mul(self, expr: sympy.Mul) -> str:
        coefficient, factors = expr.as_coeff_mul()
        if coefficient.is_negative:
            return "-" + self.parenthesize(-expr, PRECEDENCE["Mul"])
        above: list[str] = []
        below: list[str] = []
        if coefficient.is_Rational and int(coefficient.q) & (int(coefficient.q) - 1):
            below.append(str(coefficient.q))
            coefficient = sympy.Integer(coefficient.p)
        if coefficient != 1:
            above.append(self.parenthesize(coefficient, PRECEDENCE["Mul"]))
        for factor in sympy.Mul(*factors).as_ordered_factors():
            base, exponent = factor.as_base_exp()
            if (
                not isinstance(factor, sympy.Function)
                and exponent.is_Rational
                and exponent.is_negative
                and exponent != -sympy.Rational(1, 2)
                and not factor.is_number
            ):
                below.append(self.parenthesize(base**-exponent, PRECEDENCE["Mul"] + 1))
            else:
                above.append(self.parenthesize(factor, PRECEDENCE["Mul"]))
        code = " * ".join(above or ["1"])
        return code + "".join(f" / {divisor}" for divisor in below)

    def _print_Pow(self, expr: sympy.Pow) -> str:
        base, exponent = expr.as_base_exp()
        if expr.is_number:
            return self._print_number(expr)
        if exponent == -sympy.Rational(1, 2):
            return f"tl.rsqrt({self._print(base)})"
        if exponent.is_negative:
            return f"1 / {self.parenthesize(base**-exponent, PRECEDENCE['Mul'] + 1)}"
        if exponent == sympy.Rational(1, 2):
            return f"tl.sqrt({self._print(base)})"
        if exponent.is_Rational and exponent.q == 2:
            name = self.atom(base)
            return " * ".join([name] * int(exponent - sympy.Rational(1, 2)) + [f"tl.sqrt({name})"])
        if exponent.is_Integer:
            return self._print_integer_power(self.atom(base), int(exponent))
        raise self.refuse(f"the power {expr}")

    def _print_integer_power(self, name: str, exponent: int) -> str:
        if exponent <= 3:
            return " * ".join([name] * exponent)
        square = self.lines.fresh(f"{name}_squared")
        self.lines.statements.append(f"{square} = {name} * {name}")
        rest = f" * {name}" if exponent % 2 else ""
        return self._print_integer_power(square, exponent // 2) + rest

    def _print_number(self, expr: sympy.Expr) -> str:
        value = expr.evalf(30)
        if value != 0 and not isinstance(value, sympy.Float):  # SymPy keeps an exact zero
            raise self.refuse(f"the number {expr}")
        return repr(float(value))

    # functions

    def _print_Function(self, expr: sympy.Function) -> str:
        name = expr.func.__name__
        if isinstance(expr, Equal):
            return self._print_delta(expr)
        if isinstance(expr, Extent):
            return f"tl.cast({self.extents[_name(expr.args[0])]}, COMPUTE)"
        if expr.is_number:
            return self._print_number(expr)
        if name not in STABLE and name not in BUILTIN:
            raise self.refuse(f"the function {name!r}")
        (argument,) = expr.args
        return f"{BUILTIN.get(name, name)}({self._print(argument)})"

    def _print_delta(self, expr: sympy.Function) -> str:
        def code(argument: sympy.Basic) -> str:
            return self.axes[_name(argument)] if _name(argument) in self.axes else str(self._print(argument))

        left, right = expr.args
        return f"({code(left)} == {code(right)}).to(COMPUTE)"

    def _print_Max(self, expr: sympy.Max) -> str:
        return self._fold("tl.maximum", expr)

    def _print_Min(self, expr: sympy.Min) -> str:
        return self._fold("tl.minimum", expr)

    def _fold(self, function: str, expr: sympy.Expr) -> str:
        *rest, last = sorted(expr.args, key=sympy.default_sort_key, reverse=True)
        code = str(self._print(last))
        for argument in reversed(rest):
            code = f"{function}({self._print(argument)}, {code})"
        return code

    def _print_Piecewise(self, expr: sympy.Piecewise) -> str:
        *cases, (default, condition) = expr.args
        if condition != sympy.true:
            raise self.refuse(f"a Piecewise without a last case for everything else ({expr})")
        code = self._branch(default)
        for value, condition in reversed(cases):
            code = f"tl.where({self._print(condition)}, {self._branch(value)}, {code})"
        return code

    def _branch(self, value: sympy.Expr) -> str:
        """A case of `tl.where`, which would round a bare number to float32."""
        if not value.is_number:
            return str(self._print(value))
        number = self._print_number(value)
        exact = value.is_Rational and int(value.q) & (int(value.q) - 1) == 0 and abs(value.p) < 2**24
        return number if exact else f"tl.full((), {number}, COMPUTE)"

    # conditions

    def _print_And(self, expr: Boolean) -> str:
        return self._joined(" & ", expr)

    def _print_Or(self, expr: Boolean) -> str:
        return self._joined(" | ", expr)

    def _print_Not(self, expr: Boolean) -> str:
        return f"~({self._print(expr.args[0])})"

    def _joined(self, operator: str, expr: Boolean) -> str:
        return operator.join(f"({self._print(a)})" for a in sorted(expr.args, key=sympy.default_sort_key))

    def _print_Relational(self, expr: sympy.core.relational.Relational) -> str:
        operator = {"Equality": "==", "Unequality": "!="}.get(type(expr).__name__, expr.rel_op)
        return f"{self._print(expr.lhs)} {operator} {self._print(expr.rhs)}"


def _name(argument: sympy.Basic) -> str:
    return str(getattr(argument, "name", argument))


def folded(expr: sympy.Expr) -> sympy.Expr:
    """`expr` with its irrational numbers as literals: a name for one would hold a float32."""

    def irrational(part: sympy.Basic) -> bool:
        return isinstance(part, sympy.Expr) and bool(part.is_number) and not part.is_Rational and not part.is_infinite

    return expr.replace(irrational, lambda number: number.evalf(30))


def hoist(
    expr: sympy.Expr, inner: frozenset[str], name: Callable[[sympy.Expr], str], vectors: frozenset[str] = frozenset()
) -> sympy.Expr:
    """`expr` with every largest part that depends on no symbol in `inner` replaced by the symbol `name` gives it.

    Sums of scaled symbols stay: they cost no more than what would replace them, and (f - max) - tail must not be reordered.
    `vectors` are held anyway: in a product they stay, lest their multiple be held beside them.
    """
    if not isinstance(expr, sympy.Expr) or all(term.as_coeff_Mul()[1].is_Atom for term in sympy.Add.make_args(expr)):
        return expr
    if expr.is_number:
        return expr
    if not {_name(symbol) for symbol in expr.free_symbols} & inner:
        return sympy.Symbol(name(expr))
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        held = inner | vectors if expr.is_Mul else inner
        fixed = [a for a in expr.args if not {_name(s) for s in a.free_symbols} & (held if a.is_Atom else inner)]
        moving = [hoist(a, inner, name, vectors) for a in expr.args if a not in fixed]
        return expr.func(hoist(expr.func(*fixed), inner, name, vectors), *moving)
    if isinstance(expr, Equal | sympy.Piecewise):
        return expr
    return expr.func(*(hoist(a, inner, name, vectors) for a in expr.args))
