"""Sums of squares of few long rows are those that torch gives."""

from __future__ import annotations

import pytest
import torch

from satchel.runtime.sums import _LONG, summed, summed_squares


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
