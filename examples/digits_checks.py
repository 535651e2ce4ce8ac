"""What the fields must hold, computed with plain autograd and loops: slow, dense, and sharing no code with satchel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Fields = dict[str, list[list[Tensor]]]  # field -> parameter -> its value (two tensors for a weight's Kronecker factors)


def exact_fields(model: nn.Sequential, loss: nn.CrossEntropyLoss, x: Tensor, y: Tensor) -> Fields:
    """All deterministic fields of a sequence of Linear and elementwise modules under a mean loss."""
    N, parameters = len(x), list(model.parameters())
    gradients = per_sample_gradients(model, loss, x, y)
    jacobians, hessians = output_jacobians(model, x), loss_hessians(model, loss, x, y)
    squares = [(g**2).sum(0) for g in gradients]
    ggn = [torch.einsum("ncp,ncd,ndp->p", J.flatten(2), hessians, J.flatten(2)).view(J.shape[2:]) for J in jacobians]
    single: dict[str, list[Tensor]] = {
        "grad_batch": gradients,
        "batch_l2": [(g.flatten(1) ** 2).sum(1) for g in gradients],
        "sum_grad_squared": squares,
        "variance": [s / N - g.mean(0) ** 2 for g, s in zip(gradients, squares, strict=True)],
        "diag_ggn_exact": ggn,
        "diag_h": hessian_diagonal(loss(model(x), y), parameters),
    }
    fields = {field: [[value] for value in values] for field, values in single.items()}
    return fields | {"kflr": kflr(model, x, jacobians, hessians), "kfra": kfra(model, x, hessians)}


def per_sample_gradients(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """∇ of ℓ_n / N, one backward pass for each sample: [N, *θ]."""
    rows = [torch.autograd.grad(loss(model(x[[n]]), y[[n]]) / len(x), list(model.parameters())) for n in range(len(x))]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def output_jacobians(model: nn.Module, x: Tensor) -> list[Tensor]:
    """∂f_n/∂θ, one backward pass for each sample and output: [N, C, *θ]."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(f, parameters, retain_graph=True) for sample in x for f in model(sample)]
    return [torch.stack(column).view(len(x), -1, *column[0].shape) for column in zip(*rows, strict=True)]


def loss_hessians(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """∇²ℓ_n / N with respect to the network's output: [N, C, C]."""
    outputs = model(x).detach()
    hessian = torch.func.jacrev(torch.func.jacrev(lambda f, target: loss(f, target) / len(x)))
    return torch.stack([hessian(f, target) for f, target in zip(outputs, y, strict=True)])


def hessian_diagonal(loss: Tensor, parameters: list[nn.Parameter], rows: int = 256) -> list[Tensor]:
    """The diagonal of the dense Hessian, `rows` of its rows at a time."""
    diagonals = []
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, create_graph=True), strict=True):
        pieces = []
        for piece in torch.eye(parameter.numel(), dtype=loss.dtype).split(rows):
            start = torch.autograd.grad(
                gradient, parameter, piece.view(-1, *parameter.shape), retain_graph=True, is_grads_batched=True
            )
            pieces.append((start[0].flatten(1) * piece).sum(1))
        diagonals.append(torch.cat(pieces).view_as(parameter))
    return diagonals


def kflr(model: nn.Sequential, x: Tensor, jacobians: list[Tensor], hessians: Tensor) -> list[list[Tensor]]:
    """B = Σ_n J_nᵀ ∇²ℓ_n J_n at the layer's output, whose Jacobian is that of the bias; A = mean_n a_n a_nᵀ."""
    fields: list[list[Tensor]] = []
    biases = iter(jacobians[1::2])
    for module in model:
        if isinstance(module, nn.Linear):
            J = next(biases)
            B = torch.einsum("nco,ncd,ndp->op", J, hessians, J)
            fields += [[B, _second_moment(x)], [B]]
        x = module(x).detach()
    return fields


def kfra(model: nn.Sequential, x: Tensor, hessians: Tensor) -> list[list[Tensor]]:
    """Ḡ starts as Σ_n ∇²ℓ_n and passes every module as mean_n J_nᵀ Ḡ J_n; B = Ḡ."""
    inputs = [x]
    for module in model:
        inputs.append(module(inputs[-1]).detach())
    G, fields = hessians.sum(0), []
    for module, value in reversed(list(zip(model, inputs[:-1], strict=True))):
        if isinstance(module, nn.Linear):
            fields += [[G], [G, _second_moment(value)]]
        J = torch.stack([torch.func.jacrev(module)(sample) for sample in value]).detach()
        G = torch.einsum("noi,op,npj->ij", J, G, J) / len(x)
    return fields[::-1]


def _second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)
