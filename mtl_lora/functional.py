"""The formula of MTL-LoRA, once.

    h = W x + s · Σᵢ softmax(w_t / τ)ᵢ Bᵢ Λ_t A x          (arXiv 2410.09437, section 3; s = lora_alpha / r)

The mixture and Λ_t do not depend on the input, so they fold into one matrix a task,

    U_t = s · (Σᵢ αᵢ Bᵢ) Λ_t    (O, R),        h = W x + U_t (A x),

and a task *is* a LoRA of rank R with down-projection A and up-projection U_t. With the up-projections' columns side by
side, U_tᵀ = C_t [B₁ … B_N]ᵀ for a small matrix C_t (R, N·R) with the blocks s α_ti Λ_tᵀ. So a row may also be lifted to
the N·R columns, z = C_tᵀ A x, and then all tasks share one wide product, h = W x + [B₁ … B_N] z.

Axes: B batch, S sequence, I input features, O output features, R rank, T tasks, N up-projections.
"""

import torch
from torch import Tensor

__all__ = ["combine", "combine_backward", "fold", "folding_dtype", "mixing_weights", "stack_columns"]


def folding_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that folding computes in: at least fp32, since a softmax over w / τ loses digits below it."""
    return torch.promote_types(dtype, torch.float32)


def mixing_weights(mixing_TN: Tensor, temperature: float) -> Tensor:
    """Return softmax(w_t / τ) over the up-projections, (T, N), in at least fp32."""
    return torch.softmax(mixing_TN.to(folding_dtype(mixing_TN.dtype)) / temperature, dim=-1)


def _transposed(transform: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Λᵀ (T, R, R) in full."""
    transform = transform.to(dtype)
    return torch.diag_embed(transform) if transform.dim() == 2 else transform.transpose(1, 2)


def combine(transform: Tensor, mixing_TN: Tensor, temperature: float, scaling: float) -> tuple[Tensor, Tensor]:
    """Return C (T, R, N·R), mixture, Λ and scaling in one small matrix a task, and the mixture α (T, N).

    Args:
        transform: Λ, (T, R, R) or its diagonal (T, R).
        mixing_TN: the mixing logits w.
        temperature: τ.
        scaling: s.
    """
    weights_TN = mixing_weights(mixing_TN, temperature)
    lambda_TRR = _transposed(transform, folding_dtype(transform.dtype)).unsqueeze(2)
    return (lambda_TRR * (weights_TN * scaling)[:, None, :, None]).flatten(2), weights_TN


def combine_backward(
    grad_combination: Tensor, transform: Tensor, weights_TN: Tensor, temperature: float, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`combine` for Λ and w, given that for C (T, R, N·R) and the mixture α (T, N)."""
    (num_tasks, num_ups), rank = weights_TN.shape, grad_combination.shape[1]
    grad_TRNR = grad_combination.view(num_tasks, rank, num_ups, rank) * scaling
    grad_transform = (grad_TRNR * weights_TN[:, None, :, None]).sum(2).transpose(1, 2)
    grad_weights_TN = (grad_TRNR * _transposed(transform, weights_TN.dtype).unsqueeze(2)).sum((1, 3))
    if transform.dim() == 2:
        grad_transform = grad_transform.diagonal(dim1=1, dim2=2)
    centred_TN = grad_weights_TN - (weights_TN * grad_weights_TN).sum(-1, keepdim=True)
    return grad_transform, weights_TN * centred_TN / temperature


def stack_columns(up_NOR: Tensor) -> Tensor:
    """Return [B₁ … B_N]ᵀ (N·R, O)."""
    return up_NOR.transpose(1, 2).flatten(0, 1)


def fold(up_NOR: Tensor, transform: Tensor, mixing_TN: Tensor, temperature: float, scaling: float) -> Tensor:
    """Return every task's Uᵀ (T, R, O) in :func:`folding_dtype`; arguments as :func:`combine`, and B (N, O, R).

    A product a task and not one for all: a task's bits then do not depend on how many other tasks there are.
    """
    combination = combine(transform, mixing_TN, temperature, scaling)[0]
    stacked = stack_columns(up_NOR.to(combination.dtype))
    return torch.bmm(combination, stacked.expand(combination.shape[0], -1, -1))
