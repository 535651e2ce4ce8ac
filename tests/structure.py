"""Kronecker structure of torch's own modules, for the references: y[n, r, g, o] = Σ_i W[g, o, i] a[n, g, r, i] + b[g, o].

a is found by calling the module with weights that are 1 at one i and 0 elsewhere: no unfolding of ours, whatever its options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLVING = (*CONVOLUTIONS, *TRANSPOSED)
TABLES = (nn.Embedding, nn.EmbeddingBag)
#: Modules whose outputs have the axes of their bias last; the others have channels behind the batch.
TRAILING = (nn.Linear, nn.LayerNorm, nn.RMSNorm, *TABLES)


def is_kronecker(module: nn.Module, name: str) -> bool:
    """Whether the curvature of a parameter has factors: a bias has the output's alone, a scale none."""
    return name == "bias" or isinstance(module, (nn.Linear, *CONVOLVING, *TABLES))


def groups(module: nn.Module, name: str) -> int:
    return int(getattr(module, "groups", 1)) if name == "weight" else 1


def by_position(module: nn.Module, name: str, output: Tensor, lead: int) -> Tensor:
    """[*lead, *output] → [*lead, R, G, O]."""
    G = groups(module, name)
    if isinstance(module, TRAILING):
        rank = len(module.normalized_shape) if isinstance(module, nn.LayerNorm | nn.RMSNorm) else 1
        positions = output.shape[lead:-rank].numel()
        return output.reshape(*output.shape[:lead], positions, G, -1)
    positions = output.flatten(lead + 1) if output.ndim > lead + 1 else output[..., None]
    return positions.movedim(-1, lead).unflatten(-1, (G, -1))


def weight_of(module: nn.Module, blocks: Tensor) -> Tensor:
    """[G, O, I] as the module's weight."""
    shape = module.weight.shape
    if isinstance(module, TRANSPOSED):
        G, O, _ = blocks.shape
        return blocks.reshape(G, O, shape[0] // G, *shape[2:]).transpose(1, 2).reshape(shape)
    return blocks[0].T if isinstance(module, TABLES) else blocks.reshape(shape)


def patches(module: nn.Module, x: Tensor, options: Mapping[str, Any]) -> Tensor:
    """a [N, R, G, I]."""
    G = groups(module, "weight")
    O = module.weight.shape[1] if isinstance(module, (*TRANSPOSED, *TABLES)) else module.weight.shape[0] // G
    I = module.weight.numel() // (G * O)
    found = []
    for i in range(I):
        blocks = torch.zeros(G, O, I, dtype=module.weight.dtype)
        blocks[:, 0, i] = 1
        tensors = {"weight": weight_of(module, blocks)}
        if getattr(module, "bias", None) is not None:
            tensors["bias"] = torch.zeros_like(module.bias)
        with torch.no_grad():
            found.append(
                by_position(module, "weight", functional_call(module, tensors, (x,), dict(options)), 1)[..., 0]
            )
    a = torch.stack(found, -1)
    if getattr(module, "padding_idx", None) is not None:  # this row is a constant
        a[..., module.padding_idx] = 0
    return a
