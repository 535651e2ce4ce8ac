"""Elementwise SymPy expressions as PyTorch source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
from sympy import Expr
from sympy.printing.str import StrPrinter

from ..calculus.terms import CalculusError
from ..lowering.plan import extent_symbol
from ..notation import Extent, Option, index_atoms

_FUNCTIONS = {
    "exp": "torch.exp", "log": "torch.log", "tanh": "torch.tanh", "sigmoid": "torch.sigmoid", "erf": "torch.erf",
    "softplus": "F.softplus", "Abs": "torch.abs", "sign": "torch.sign", "sin": "torch.sin", "cos": "torch.cos",
}  # fmt: skip


class AtenPrinter(StrPrinter):
    """Elementwise SymPy expressions as torch source; a function it does not know is refused by name."""

    def __init__(self, names: Mapping[Expr, str], like: str = "", scalars: frozenset[Expr] = frozenset()) -> None:
        super().__init__({"order": "none"})
        self.names, self.like, self.scalars = names, like, scalars

    def emptyPrinter(self, expr: Expr) -> str:
        raise CalculusError(f"the ATen printer does not know {type(expr).__name__}: {expr}")

    def _print(self, expr: Expr, **kwargs: object) -> str:
        return self.names[expr] if expr in self.names else super()._print(expr, **kwargs)

    def _print_Function(self, expr: Expr) -> str:
        name = expr.func.__name__
        if name not in _FUNCTIONS:
            raise CalculusError(f"the ATen printer does not know the function {name!r} in {expr}")
        return f"{_FUNCTIONS[name]}({self._print(expr.args[0])})"

    def _print_softplus(self, expr: Expr) -> str:
        # torch takes the identity above 20 by default, which float64 can tell apart.
        return f"F.softplus({self._print(expr.args[0])}, threshold=40)"

    _print_exp = _print_log = _print_tanh = _print_sigmoid = _print_Abs = _print_sign = _print_erf = _print_Function
    _print_sin = _print_cos = _print_Function

    def _print_Add(self, expr: sympy.Add) -> str:
        """Positive parts first: `input - lse`; one operation for a tensor less another's squares."""
        for read in expr.args if len(expr.args) == 2 else ():
            base, exponent = (read - expr).as_base_exp()
            if exponent == 2 and read in self.names and base in self.names:
                first, second = self._print(read), self._print(base)
                return f"torch.addcmul({first}, {second}, {second}, value=-1)"
        negative = [part for part in expr.args if part.could_extract_minus_sign()]
        text = " + ".join(self.parenthesize(part, 40) for part in expr.args if part not in negative)
        for part in negative:
            text += (" - " if text else "-") + self.parenthesize(-part, 45)
        return text

    def _print_Mul(self, expr: sympy.Mul) -> str:
        """What passes a threshold, by one operation."""
        for part in expr.args:
            above, rest = threshold(part), sympy.Mul(*(other for other in expr.args if other is not part))
            if above is not None and above.lhs in self.names and rest.atoms(sympy.Indexed):
                return f"above({self._print(rest)}, {self._print(above.lhs)}, {above.rhs})"
        tensors = [part for part in expr.args if index_atoms(part)]
        if len(tensors) > 2:  # small operands meet first
            ordered = sorted(tensors, key=lambda part: len(index_atoms(part)))
            others = [part for part in expr.args if not index_atoms(part)]
            expr = sympy.Mul(*others, *ordered, evaluate=False)
        return super()._print_Mul(expr)

    def _print_Mod(self, expr: Expr) -> str:
        return " % ".join(self.parenthesize(part, 50) for part in expr.args)

    def _print_Extent(self, expr: Extent) -> str:
        return str(extent_symbol(expr.args[0]))

    def _print_Rational(self, expr: sympy.Rational) -> str:
        return f"{expr.p} / {expr.q}"

    def _print_Float(self, expr: sympy.Float) -> str:
        return repr(float(expr))

    def _print_finite(self, expr: Expr) -> str:
        return f"({self._print(expr.args[0])} > -math.inf).to({self.like}.dtype)"

    def _print_Pi(self, expr: Expr) -> str:
        return "math.pi"

    def _print_Pow(self, expr: Expr) -> str:
        base, exponent = expr.args
        text = self._print(base)
        scalar = bool(base.is_number or isinstance(base, Extent) or _of_numbers(base, self.scalars))
        if scalar and abs(exponent) == sympy.Rational(1, 2):
            return f"math.sqrt({text})" if exponent > 0 else f"1 / math.sqrt({text})"
        if scalar and exponent.is_Integer and exponent > 0:
            return f"{self.parenthesize(base, 70)}**{exponent}"
        if exponent == 2:
            return f"{text}.square()" if is_postfix(text) else f"torch.square({text})"
        if exponent == sympy.Rational(1, 2):
            return f"torch.sqrt({text})"
        if exponent == -1:
            return f"1 / {self.parenthesize(base, 60)}"
        if exponent.is_Integer and exponent > 0:
            return f"{self.parenthesize(base, 70)} ** {exponent}"
        return f"torch.pow({text}, {self._print(exponent)})"

    def _print_Max(self, expr: sympy.Max) -> str:
        """A lower bound, as a number."""
        bound, value = expr.args
        if not bound.is_number:
            raise CalculusError(f"the ATen printer knows a maximum with a number only, not {expr}")
        # What is computed for this may be changed.
        text, place = self._print(value), "" if value in self.names else "_"
        return f"{postfix(text)}.clamp{place}(min={self._print(bound)})"

    def _print_Piecewise(self, expr: sympy.Piecewise) -> str:
        *cases, (otherwise, always) = expr.args
        if always != sympy.true:
            raise CalculusError(f"a Piecewise must end with a default: {expr}")
        if len(cases) == 1 and cases[0][0] == 1 and otherwise == 0:
            return f"({self._print(cases[0][1])}).to({self.like}.dtype)"
        text = self._branch(otherwise)
        for value, condition in reversed(cases):
            text = f"torch.where({self._print(condition)}, {self._branch(value)}, {text})"
        return text

    def _branch(self, value: Expr) -> str:
        """A number takes the tensors' dtype: torch.where of two Python numbers would be float32."""
        return f"{self.like}.new_tensor({float(value)!r})" if value.is_number else self._print(value)

    def _print_relational(self, expr: Expr) -> str:
        sign = {
            "StrictGreaterThan": ">",
            "GreaterThan": ">=",
            "StrictLessThan": "<",
            "LessThan": "<=",
            "Equality": "==",
        }
        return f"{self._print(expr.args[0])} {sign[type(expr).__name__]} {self._print(expr.args[1])}"

    _print_StrictGreaterThan = _print_GreaterThan = _print_StrictLessThan = _print_LessThan = _print_relational

    def _print_And(self, expr: Expr) -> str:
        return " & ".join(f"({self._print(a)})" for a in expr.args)

    def _print_Or(self, expr: Expr) -> str:
        return " | ".join(f"({self._print(a)})" for a in expr.args)


def repeated(expr: Expr) -> list[Expr]:
    """Calls of transcendental functions that occur more than once, inner ones first."""
    counts: dict[Expr, int] = {}
    for part in sympy.preorder_traversal(expr):
        if type(part).__name__ in _FUNCTIONS and part.atoms(sympy.Indexed):
            counts[part] = counts.get(part, 0) + 1
    return sorted((call for call, count in counts.items() if count > 1), key=lambda call: (call.count_ops(), str(call)))


def threshold(expr: Expr) -> Expr | None:
    """x > c, of what is 1 there and 0 elsewhere."""
    if not isinstance(expr, sympy.Piecewise) or [value for value, _ in expr.args] != [1, 0]:
        return None
    above = expr.args[0][1]
    return above if isinstance(above, sympy.StrictGreaterThan) and above.rhs.is_number else None


def _of_numbers(expr: Expr, scalars: frozenset[Expr]) -> bool:
    """Whether an expression holds no tensor, only numbers of the module."""
    return bool(expr.free_symbols) and all(isinstance(s, Option) or s in scalars for s in expr.free_symbols)


def is_postfix(text: str) -> bool:
    """Whether `.method()` binds to the whole text: a name, or one bracketed group with a prefix name."""
    depth = 0
    for character in text:
        if character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
        elif depth == 0 and not (character.isalnum() or character in "_."):
            return False
    return True


def postfix(text: str) -> str:
    """What a method can be called on, or a sign put before."""
    return text if is_postfix(text) else f"({text})"


def sequence(parts: Sequence[str]) -> str:
    """A tuple."""
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
