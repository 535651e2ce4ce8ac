"""Formulas as readable mathematics, for docstrings, error messages and `explain`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import sympy
from sympy import Expr
from sympy.printing.str import StrPrinter

from .notation import Index

if TYPE_CHECKING:
    from .calculus.instantiate import Formula
    from .calculus.terms import Term

_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class _Formula(StrPrinter):
    def _print_Index(self, index: Index) -> str:
        return index.name

    def _print_Indexed(self, expr: Any) -> str:
        return f"{expr.base}[{', '.join(self._print(i) for i in expr.indices)}]"

    def _print_Mul(self, expr: Any) -> str:
        constant, rest = expr.as_coeff_Mul()
        numerator, denominator = sympy.fraction(rest)
        parts = [
            self.parenthesize(a, sympy.printing.precedence.PRECEDENCE["Mul"]) for a in numerator.as_ordered_factors()
        ]
        head = "−" if constant < 0 else ""
        if abs(constant) != 1:
            parts.insert(0, str(abs(constant)))
        text = head + " ".join(p for p in parts if p != "1" or len(parts) == 1)
        if denominator != 1:
            text = f"{text} / {self.parenthesize(denominator, 55)}"
        return text

    def _print_Add(self, expr: Any) -> str:
        negative = [part for part in expr.args if part.could_extract_minus_sign()]
        text = " + ".join(self.parenthesize(part, 40) for part in expr.args if part not in negative)
        for part in negative:
            text += (" − " if text else "−") + self.parenthesize(-part, 45)
        return text

    def _print_Pow(self, expr: Any) -> str:
        base, exponent = expr.args
        if exponent == sympy.Rational(1, 2):
            text = self._print(base)
            return f"√{text}" if base.is_Symbol or base.is_Integer or isinstance(base, sympy.Indexed) else f"√({text})"
        if exponent.is_Integer and exponent > 0:
            return self.parenthesize(base, 70) + str(exponent).translate(_SUPERSCRIPT)
        return str(super()._print_Pow(expr)).replace("**", "^")

    def _print_Piecewise(self, expr: Any) -> str:
        cases = [f"{self._print(value)} if {self._print(cond)}" for value, cond in expr.args[:-1]]
        return f"({', '.join(cases)}, else {self._print(expr.args[-1][0])})"

    def _print_ceiling(self, expr: Any) -> str:
        return f"⌈{self._print(expr.args[0])}⌉"


_printer = _Formula({"order": "none"})


def render(expr: Expr) -> str:
    """An expression, e.g. `Σ_{i} W[o, i] x[n, i] + b[o]`."""
    return _printer.doprint(expr).replace(" - ", " − ")


def _sums(indices: frozenset[Index]) -> str:
    return f"Σ_{{{','.join(sorted(i.name for i in indices))}}} " if indices else ""


def wrapped(text: str) -> str:
    """A formula on lines of readable length."""
    return "\n".join(textwrap.wrap(text, 112, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))


def render_term(term: Term) -> str:
    """One term, sums first."""
    parts = [f"δ({render(a)}, {render(b)})" for a, b in term.deltas]
    if term.factor != 1 or (not parts and term.square is None):
        needs = term.factor.is_Add and (term.sums or parts or term.square is not None)
        parts.append(f"({render(term.factor)})" if needs else render(term.factor))
    if term.square is not None:
        centred = "" if term.square.centred is None else f" − mean_{term.square.centred.name}"
        parts.append(f"({render_term(term.square)}{centred})²")
    return _sums(term.sums) + " ".join(parts)


def render_formula(formula: Formula) -> str:
    """`name[axes] = …`."""
    head = f"{formula.name}[{', '.join(i.name for i in formula.axes)}]"
    body = " + ".join(render_term(term) for term in formula.terms) or "0"
    return f"{head} = {body}".replace("+ −", "− ")
