"""Products that torch, or the runtime, computes without what the indices alone would ask for: windows, or one of two halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sympy import Expr

from ..lowering.plan import Contract, Leaf, Window, is_place_gram, is_transposed
from ..notation import Option
from .aten_expr import sequence

if TYPE_CHECKING:
    from .aten import Body


def correlation(body: Body, node: Contract) -> str | None:
    """A product of windows with a kernel, summed over the taps, is a convolution."""
    for image, kernel in ((node.left, node.right), (node.right, node.left)):
        if not isinstance(image, Leaf) or not image.windows:
            continue
        taps, places = tuple(w.tap for w in image.windows), tuple(w.place for w in image.windows)
        channels = tuple(i for i in node.over if i not in taps)
        groups = tuple(i for i in kernel.axes if i in node.axes and i in image.axes)
        out = tuple(i for i in kernel.axes if i in node.axes and i not in groups)
        lead = tuple(i for i in image.axes if i not in (*groups, *channels, *places, *taps))
        single = len(channels) == len(groups) == len(out) == 1
        if not single or not set(taps) <= set(node.over) or set(places) & set(node.over):
            continue
        if node.axes != (*lead, *groups, *out, *places):
            continue
        transposed, numbers = geometry(body, image.windows)
        order = (*groups, *channels, *out, *taps) if transposed else (*groups, *out, *channels, *taps)
        weights = body.operand(kernel)
        if kernel.axes != order:
            weights = f"{weights}.permute({', '.join(str(kernel.axes.index(i)) for i in order)})"
        arguments = [body.stored(image), weights, body.sizes(places), *numbers]
        return f"correlate{'_transposed' if transposed else ''}({', '.join(arguments)})"
    return None


def kernel_gradients(body: Body, node: Contract) -> str | None:
    """A product of windows with a factor, summed over the places, is the gradient of a convolution's kernel, by sample."""
    for image, factor in ((node.left, node.right), (node.right, node.left)):
        if not isinstance(image, Leaf) or not image.windows or not isinstance(factor, Leaf):
            continue
        taps, places = tuple(w.tap for w in image.windows), tuple(w.place for w in image.windows)
        lead = tuple(i for i in image.axes if i not in (*places, *taps) and i in factor.axes)
        inner = tuple(i for i in image.axes if i not in (*lead, *places, *taps))
        outer = tuple(i for i in factor.axes if i not in (*lead, *places))
        if set(node.over) != set(places) or not len(lead) == len(outer) == 2 or len(inner) != 1:
            continue
        columns, out = outer
        transposed, numbers = geometry(body, image.windows)
        kernel = (*inner, out) if transposed else (out, *inner)
        if factor.axes != (columns, *lead, out, *places) or node.axes != (columns, *lead, *kernel, *taps):
            continue
        arguments = [body.stored(image), body.leaf(factor), body.sizes(taps), *numbers]
        if transposed:
            return f"transposed_kernel_gradients({', '.join(arguments)})"
        return f"kernel_gradients({', '.join(arguments)}{body.out(node)})"
    return None


def window_gram(body: Body, node: Contract) -> str | None:
    """A product of the windows of a tensor with themselves, summed over samples and places."""
    one, other = node.left, node.right
    if not isinstance(one, Leaf) or not isinstance(other, Leaf) or not one.windows or one.name != other.name:
        return None
    (places, taps), (_, others) = (
        [tuple(getattr(w, kind) for w in image.windows) for kind in ("place", "tap")] for image in (one, other)
    )
    if [w.place for w in other.windows] != list(places) or set(node.over) != {one.axes[0], *places}:
        return None
    (group, inner), second = one.axes[1:3], other.axes[2]
    transposed, numbers = geometry(body, one.windows)
    if transposed or node.axes != (group, inner, *taps, second, *others):
        return None
    arguments = [body.stored(one), body.sizes(places), body.sizes(taps), *numbers]
    return f"window_gram({', '.join(arguments)}{body.out(node)})"


def place_gram(body: Body, node: Contract) -> str | None:
    """A product of the windows of a tensor with those at other places, summed over taps and channels."""
    image = node.left
    if not is_place_gram(node) or not isinstance(image, Leaf):
        return None
    _, numbers = geometry(body, image.windows)
    places, taps = (body.sizes([getattr(w, kind) for w in image.windows]) for kind in ("place", "tap"))
    return f"place_gram({', '.join([body.stored(image), places, taps, *numbers])})"


def summed_gram(body: Body, node: Contract) -> str | None:
    """A product of a tensor with itself, summed over its first and its last axes."""
    one, other, kept = node.left, node.right, len(node.axes) - 1
    if not isinstance(one, Leaf) or not isinstance(other, Leaf) or one.name != other.name or one.windows:
        return None
    lead = next((k for k, axis in enumerate(one.axes) if axis not in node.over), 0)
    if not lead or set(node.over) != {*one.axes[:lead], *one.axes[lead + kept :]} or len(one.axes) == lead + kept:
        return None
    twin = (*one.axes[: lead + kept - 1], node.axes[-1], *one.axes[lead + kept :])
    if node.axes[:-1] != one.axes[lead : lead + kept] or other.axes != twin:
        return None
    text = body.leaf(one)
    return f"summed_gram({text if len(one.axes) == lead + kept + 1 else f'{text}.flatten({lead + kept})'}, {lead})"


def geometry(body: Body, found: Sequence[Window]) -> tuple[bool, list[str]]:
    """Stride, dilation and padding, and whether the windows are those of the transposed access."""
    transposed = is_transposed(found)
    sign = -1 if transposed else 1
    parts = [(w.divisor if transposed else w.step, sign * w.reach, -sign * w.offset) for w in found]
    return transposed, [_numbers(body, [part[k] for part in parts]) for k in range(3)]


def _numbers(body: Body, values: Sequence[Expr]) -> str:
    """One number per axis: an option where they are its components."""
    first = values[0]
    if isinstance(first, Option) and all(isinstance(v, Option) and v.part == k for k, v in enumerate(values)):
        return first.attribute
    return sequence([body.scalar(v) for v in values])


#: Each gives the source of a product that it recognises, or None.
RECOGNISED: tuple[Callable[[Body, Contract], str | None], ...] = (
    correlation, kernel_gradients, window_gram, place_gram, summed_gram,
)  # fmt: skip
