"""Context of extension.py.jinja."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
from sympy import Expr

from ..definitions.model import Feature
from ..definitions.quantities import PER_SAMPLE, SAMPLES, UNIT
from ..formula import render
from .aten_expr import AtenPrinter
from .contexts import module_name

_OPTION_TYPES = {
    "mc_samples": "int = 1",
    "generator": "torch.Generator | None = None",
    "subsampling": "Sequence[int] | None = None",
    "approximation": "str | None = None",
}
_OPTION_TEXTS = {
    "mc_samples": "number M of Monte-Carlo samples per input.",
    "generator": "where they are drawn from; torch's global generator stays untouched if one is given.",
    "subsampling": "indices of the samples to compute, None for all; the scale stays that of the whole batch.",
    "approximation": 'treatment of shared axes, "expand", "reduce" or "backpack"; None for the layer\'s default.',
}


def feature_context(feature: Feature) -> dict[str, Any]:
    """The context of extension.py.jinja."""
    curvature = set(feature.needs) - {"gradient", "input"}
    context: dict[str, Any] = {
        "name": feature.name, "field": feature.field, "file": module_name(feature), "formula": feature.formula,
        "shape": feature.shape, "reference": feature.reference, "options": feature.options,
        "option_types": _OPTION_TYPES, "option_texts": _OPTION_TEXTS, "factors": "", "summands": (),
        "summary": f"{feature.name}, the field `{feature.field}`.", "differentiable": set(feature.needs) == {"gradient"},
        "source": next(iter(curvature), "gradient"), "value": "", "table5": "", "block": "",
        "value_text": "as above, with the loss's own c inside" if curvature else feature.formula,
        "needs": [(source, q.name) for source, quantities in feature.needs.items() for q in quantities],
    }  # fmt: skip
    if isinstance(feature.value, Mapping):
        named = {a: tuple(q.name for q in factors) for a, factors in feature.value.items()}
        assert feature.block is not None
        context |= {"factors": repr(named), "only_approximation": next(iter(named)), "block": feature.block.name}
        context |= {"value_text": "[B, A] as above, with the loss's own c inside s", "table5_text": "[B · u / N, A]"}
        return context
    context["table5_text"] = _table5_text(feature)
    if isinstance(feature.value, sympy.Add):  # of columns from several sources, not all of which need arise
        context |= {"summands": feature.value.args, "value": "value", "table5": "value * (sizes.u / sizes.N)"}
        return context
    # δ is one column.
    symbols = {
        q.symbol: f'q["{q.name}"]' + ("[0]" if (source, q) == ("gradient", PER_SAMPLE) else "")
        for source, quantities in feature.needs.items()
        for q in quantities
    }
    names = {**symbols, UNIT: "sizes.u", SAMPLES: "sizes.N"}
    value = _scalar_print(feature.value, names)
    table5 = f"{value} * (sizes.u / sizes.N)" if feature.table5 is None else _scalar_print(feature.table5, names)
    return context | {"value": value, "table5": table5}


def _table5_text(feature: Feature) -> str:
    """Table 5's scaling relative to BackPACK's, or the formula with quantities in the field's notation."""
    if feature.table5 is None:
        return "that · u / N"
    ratio = feature.table5 / feature.value
    if ratio.free_symbols <= {UNIT, SAMPLES}:
        return f"that · {render(ratio)}"
    return render(feature.table5).replace("squared_norm", "‖g_n‖²")


def _scalar_print(expr: Expr, names: Mapping[sympy.Symbol, str]) -> str:
    return AtenPrinter(names, scalars=frozenset({UNIT, SAMPLES})).doprint(expr)
