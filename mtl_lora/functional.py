"""The formula of MTL-LoRA, once.

    h = W x + s · Σᵢ softmax(w_t / τ)ᵢ Bᵢ Λ_t A x          (arXiv 2410.09437, section 3; s = lora_alpha / r)

The mixture and Λ_t do not depend on the input, so they fold into one matrix a task,

    U_t = s · (Σᵢ αᵢ Bᵢ) Λ_t    (O, R),        h = W x + U_t (A x),

and a task *is* a LoRA of rank R with down-projection A and up-projection U_t. With the up-projections' columns side by
side, U_tᵀ = C_t [B₁ … B_N]ᵀ for a small matrix C_t (R, N·R) with the blocks s α_ti Λ_tᵀ: one product folds a task.

Axes: B batch, S sequence, I input features, O output features, R rank, T tasks, N up-projections.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Fold", "fold", "fold_backward", "folding_dtype", "mixing_weights"]


def folding_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that folding computes in: at least fp32, since a softmax over w / τ loses digits below it."""
    return torch.promote_types(dtype, torch.float32)


def mixing_weights(mixing_TN: Tensor, temperature: float) -> Tensor:
    """Return softmax(w_t / τ) over the up-projections, (T, N), in at least fp32."""
    return torch.softmax(mixing_TN.to(folding_dtype(mixing_TN.dtype)) / temperature, dim=-1)


class Fold(NamedTuple):
    """Mixture, Λ and scaling folded into one up-projection a task, and what its gradient needs.

    Attributes:
        up_TRO: Uᵀ; transposed because products with a (R, O) right-hand side are the fast ones.
        weights_TN: the mixture α.
        combination: C, (T, R, N·R).
        stacked: the up-projections' columns as rows, (N·R, O).
    """

    up_TRO: Tensor
    weights_TN: Tensor
    combination: Tensor
    stacked: Tensor


def _transposed(transform: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Λᵀ (T, R, R) in full."""
    transform = transform.to(dtype)
    return torch.diag_embed(transform) if transform.dim() == 2 else transform.transpose(1, 2)


def fold(up_NOR: Tensor, transform: Tensor, mixing_TN: Tensor, temperature: float, scaling: float) -> Fold:
    """Fold mixture, Λ and scaling into one up-projection a task, in :func:`folding_dtype`.

    A product a task and not one for all: a task's bits then do not depend on how many other tasks there are.

    Args:
        up_NOR: the shared up-projections B.
        transform: Λ, (T, R, R) or its diagonal (T, R).
        mixing_TN: the mixing logits w.
        temperature: τ.
        scaling: s.
    """
    dtype = folding_dtype(up_NOR.dtype)
    weights_TN = mixing_weights(mixing_TN, temperature).to(dtype)
    scaled_TRR = _transposed(transform, dtype) * scaling
    combination = (scaled_TRR.unsqueeze(2) * weights_TN[:, None, :, None]).flatten(2)
    stacked = up_NOR.to(dtype).transpose(1, 2).flatten(0, 1)
    up_TRO = torch.bmm(combination, stacked.expand(combination.shape[0], -1, -1))
    return Fold(up_TRO, weights_TN, combination, stacked)


def fold_backward(
    grad_TRO: Tensor, folded: Fold, transform: Tensor, temperature: float, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`fold` for B (N, O, R), Λ and w (T, N), given G = ∂L/∂Uᵀ (T, R, O).

    All three follow from two products with the wide axis O, ∂C = G [B₁ … B_N] and ∂[B₁ … B_N]ᵀ = Σ_t C_tᵀ G_t; the
    blocks of ∂C give those of Λ and α, and the softmax's own backward that of w.
    """
    weights_TN = folded.weights_TN
    (num_tasks, r, size_out), num_ups = grad_TRO.shape, weights_TN.shape[1]
    grad_rows = grad_TRO.to(weights_TN.dtype).reshape(num_tasks * r, size_out)

    grad_combination = (grad_rows @ folded.stacked.t()).view(num_tasks, r, num_ups, r) * scaling
    grad_transform = (grad_combination * weights_TN[:, None, :, None]).sum(2).transpose(1, 2)
    lambda_TRR = _transposed(transform, weights_TN.dtype)
    grad_weights_TN = (grad_combination * lambda_TRR.unsqueeze(2)).sum((1, 3))
    grad_stacked = folded.combination.flatten(0, 1).t() @ grad_rows
    grad_up_NOR = grad_stacked.view(num_ups, r, size_out).transpose(1, 2)

    centred_TN = grad_weights_TN - (weights_TN * grad_weights_TN).sum(-1, keepdim=True)
    if transform.dim() == 2:
        grad_transform = grad_transform.diagonal(dim1=1, dim2=2)
    return grad_up_NOR, grad_transform, weights_TN * centred_TN / temperature
