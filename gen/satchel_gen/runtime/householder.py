"""An exact factor whose columns depend on each other, without one of them: softmax gives C columns of rank C − 1."""

from __future__ import annotations

from torch import Tensor


def independent(factor: Tensor, null: Tensor, axis: int) -> Tensor:
    """S [K·R, *input], u [*input] ≥ 0 with ‖u‖ = 1 and Σ_k S_k u_k = 0 over an axis of extent K → S′ [(K − 1)·R, *input], S′ S′ᵀ = S Sᵀ.

    The reflection that takes u to the unit vector e_m takes S to columns S_v − u_v / (1 + u_m) S_m, of which that of m is zero. With u
    largest at m nothing cancels: in 1 − p_v of a confident class v, the digits of the others would be lost.
    """
    count = null.shape[axis]
    columns = factor.unflatten(0, (count, len(factor) // count))  # [K, R, *input]
    weights = null.unsqueeze(0).transpose(0, axis + 1).unsqueeze(1)  # [K, 1, *input], without the axis in it
    largest, place = weights.max(0, keepdim=True)
    chosen = columns.gather(0, place.expand(1, *columns.shape[1:]))
    reflected = columns - weights / (1 + largest) * chosen
    # Each element has its own m, and the last column takes that place.
    return reflected.scatter(0, place.expand_as(chosen), reflected[-1:])[:-1].flatten(0, 1)
