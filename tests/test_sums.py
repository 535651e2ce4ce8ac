"""Sums of squares of few long rows, and products of one column, are those that torch gives."""

from __future__ import annotations

import pytest
import torch

from satchel.runtime import memory, sums
from satchel.runtime.sums import _LONG, squared_norms, standardised, summed, summed_products, summed_squares


@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 4, 3), (2, 0, 3)], ids=str)
def test_a_sum_over_an_axis_of_any_extent(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(summed(tensor, 1), tensor.sum(1))


@pytest.mark.parametrize("size", [3, _LONG])
@pytest.mark.parametrize("lead", [(1,), (3,), (1, 1), (2, 3), (0, 3), (3, 0)], ids=str)
def test_both_ways_are_the_sum(lead: tuple[int, ...], size: int) -> None:
    """Of tensors in any layout, which are left as they are; and their gradient."""
    tensor = torch.randn(*lead[::-1], size, dtype=torch.float64).movedim(0, len(lead) - 1).requires_grad_()
    before = tensor.detach().clone()
    want = (tensor**2).sum(tuple(range(len(lead))))
    found = summed_squares(tensor, len(lead))
    torch.testing.assert_close(found, want)
    assert torch.equal(tensor, before)
    (gradient,) = torch.autograd.grad(found.sum(), tensor)
    torch.testing.assert_close(gradient, 2 * tensor)


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 4), 0), ((3, 4), 1), ((1, 3, 4), 1), ((2, 3, 4, 1), 1), ((1, 3, 0), 1)], ids=str
)
def test_squared_norms_are_sums_of_squares(shape: tuple[int, ...], axis: int, differentiated: bool) -> None:
    """In any layout; and their gradient, also at 0, where a norm has none."""
    tensor = torch.randn(shape[::-1], dtype=torch.float64).permute(*reversed(range(len(shape))))
    tensor.select(axis, 0).zero_()
    tensor.requires_grad_(differentiated)
    want = (tensor**2).sum([place for place in range(len(shape)) if place != axis])
    found = squared_norms(tensor, axis)
    torch.testing.assert_close(found, want)
    if differentiated:
        (gradient,) = torch.autograd.grad(found.sum(), tensor, create_graph=True)
        torch.testing.assert_close(gradient, 2 * tensor)
        (second,) = torch.autograd.grad(gradient.sum(), tensor)
        torch.testing.assert_close(second, torch.full_like(tensor, 2))


@pytest.mark.parametrize("equation", ["ncs,vncs->vnc", "vncs,ncs->vc"])
@pytest.mark.parametrize("V", [0, 1, 2])
def test_products_are_those_of_einsum(V: int, equation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one column without it; and their gradient."""
    x, y = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (V, 2, 3, 4)))
    operands = (x, y) if equation.startswith("n") else (y, x)
    want = torch.einsum(equation, *operands)
    if V == 1:
        monkeypatch.setattr(torch, "einsum", None)
    found = summed_products(equation, *operands)
    torch.testing.assert_close(found, want)
    weights = torch.randn_like(want)
    gradients = (torch.autograd.grad((f * weights).sum(), (x, y)) for f in (found, want))
    torch.testing.assert_close(next(gradients), next(gradients))


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (0, 2, 4, 5), (4, 5), (2, 1, 1)], ids=str)
def test_standardised_inputs_are_those_of_layer_norm(shape: tuple[int, ...], axes: int) -> None:
    """In any layout, and their gradient."""
    tensor = torch.randn(shape[::-1], dtype=torch.float64).permute(*reversed(range(len(shape)))).requires_grad_()
    want = torch.nn.functional.layer_norm(tensor, shape[-axes:], eps=1e-3)
    found = standardised(tensor, axes, 1e-3)
    torch.testing.assert_close(found, want)
    weights = torch.randn_like(want)
    (ours,), (theirs,) = (torch.autograd.grad((f * weights).sum(), tensor) for f in (found, want))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("transform", ["none", "jvp", "graph"])
def test_what_is_dropped_shares_memory_and_what_is_returned_does_not(
    transform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large intermediates, in any layout; not those that a graph or a transform holds."""
    x, factor = torch.randn(4, 30, 8, dtype=torch.float64).mT, torch.randn(1, 4, 8, 30, dtype=torch.float64)
    given: list[torch.Tensor | None] = []

    def asked(*tensors: torch.Tensor) -> torch.Tensor | None:
        given.append(memory.scratch(*tensors))
        return given[-1]

    def value(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = standardised(x, 1, 1e-3)
        return scaled, summed_products("nrj,vnrj->vnj", scaled, factor)

    want = value(x)
    monkeypatch.setattr(memory, "KEPT", 1)
    monkeypatch.setattr(sums, "scratch", asked)
    with torch.set_grad_enabled(transform == "graph"):
        found = value(x) if transform != "jvp" else torch.func.jvp(value, (x,), (torch.ones_like(x),))[0]
    shared = [tensor is not None for tensor in given]
    assert shared == [transform == "none"] * 2
    memory._shared.scratch.whole.fill_(255)  # not a number
    torch.testing.assert_close(found, want)


def test_a_large_mean_costs_standardised_inputs_no_digits() -> None:
    x = torch.randn(5, 7, 64, dtype=torch.float64).add(4096).float()
    want = torch.nn.functional.layer_norm(x.double(), (64,))
    torch.testing.assert_close(standardised(x, 1, 1e-5).double(), want, rtol=0, atol=2e-6)
