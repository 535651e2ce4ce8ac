"""What an adversarial reader broke once: each was a wrong number without an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from satchel import backpack, extend
from satchel.extensions import KFAC, BatchGrad, DiagGGNExact, DiagHessian

MIXING = {
    "subtract the first": lambda h: h - h[:1],
    "times the first": lambda h: h * h[0],
    "gather the first twice": lambda h: h[[0, 0, *range(2, len(h))]],
    "swap two": lambda h: h[[*range(len(h) - 2), len(h) - 1, len(h) - 2]],
    "flip": lambda h: h.flip(0),
    "shift": lambda h: h.roll(1, 0),
    "subtract the largest": lambda h: h - h.max(),
}


@pytest.mark.parametrize("samples", [2, 3, 6, 22, 38])
@pytest.mark.parametrize("mix", MIXING)
def test_samples_that_mix_are_found_in_either_direction(mix, samples):
    torch.manual_seed(0)
    model, loss = extend(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))), extend(nn.MSELoss())
    output = model[1](MIXING[mix](model[0](torch.randn(samples, 3))))
    with pytest.raises(ValueError, match=r"mixes the samples"), backpack(BatchGrad(), DiagGGNExact()):
        loss(output, torch.randn(samples, 2)).backward()


@pytest.mark.parametrize("change", [lambda m, a, o: o * 2, lambda m, a, o: o.mul_(2)], ids=["new", "in place"])
def test_hooks_that_change_the_output_come_after_the_record(change):
    model = nn.Linear(3, 2)
    model.register_forward_hook(change)
    loss = extend(nn.MSELoss())
    extend(model)
    with backpack(BatchGrad()):
        loss(model(torch.randn(5, 3)), torch.randn(5, 2)).backward()
    torch.testing.assert_close(model.weight.grad_batch.sum(0), model.weight.grad)


def test_a_patched_forward_is_no_definition():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    original = model[0].forward
    model[0].forward = lambda x: original(x) * 2
    extend(model)
    loss = extend(nn.MSELoss())
    with backpack(BatchGrad()):  # its parameters are used by nodes
        loss(model(torch.randn(5, 3)), torch.randn(5, 2)).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)


def test_table5_of_an_unreduced_loss_is_refused():
    model, loss = extend(nn.Linear(3, 2)), extend(nn.MSELoss(reduction="none"))
    with pytest.raises(RuntimeError, match="table5"), backpack(BatchGrad(scaling="table5")):
        loss(model(torch.randn(5, 3)), torch.randn(5, 2)).mean().backward()


def test_subsampling_beyond_the_batch_is_refused_before_a_field_is_set():
    model, loss = extend(nn.Linear(3, 2)), extend(nn.MSELoss())
    with (
        pytest.raises(IndexError, match=r"sample 7.*batch has 4"),
        backpack(DiagGGNExact(), BatchGrad(subsampling=[7])),
    ):
        loss(model(torch.randn(4, 3)), torch.randn(4, 2)).backward()
    assert not any(hasattr(parameter, "diag_ggn_exact") for parameter in model.parameters())


def test_some_samples_of_an_embedding_whose_positions_are_rows():
    """Row k of its indices is no sample."""
    embedding, loss = extend(nn.Embedding(7, 3)), extend(nn.MSELoss())
    x, y = torch.randint(7, (5, 2)), torch.randn(5, 2, 3)

    def grad_batch(**options):
        with backpack(BatchGrad(**options)):
            loss(embedding(x.flatten()).unflatten(0, x.shape), y).backward()
        return embedding.weight.grad_batch

    torch.testing.assert_close(grad_batch(subsampling=[3, -4]), grad_batch()[[3, 1]])


def test_a_class_alone_has_no_curvature():
    """Its exact factor has no columns; positions make the rules products of matrices."""
    model, head = extend(nn.Linear(4, 5)), extend(nn.Linear(5, 1))
    loss = extend(nn.CrossEntropyLoss())
    with backpack(DiagGGNExact(), DiagHessian()):
        loss(head(model(torch.randn(5, 3, 4)).tanh().mean(1)), torch.zeros(5).long()).backward()
    for parameter in (*model.parameters(), *head.parameters()):
        assert not parameter.diag_ggn_exact.any() and not parameter.diag_h.any()


@pytest.mark.parametrize("width", [10, 300])
def test_the_input_factor_of_an_empty_batch_is_a_mean_over_nothing(width):
    model, loss = extend(nn.Linear(width, 3)), extend(nn.CrossEntropyLoss())
    with backpack(KFAC()):
        loss(model(torch.randn(0, width)), torch.zeros(0).long()).backward()
    assert model.weight.kfac[1].shape == (width, width) and model.weight.kfac[1].isnan().all()
