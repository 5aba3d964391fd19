"""The formula of MTL-LoRA, once.

    h = W x + s · Σᵢ softmax(w_t / τ)ᵢ Bᵢ Λ_t A x          (arXiv 2410.09437, section 3; s = lora_alpha / r)

The mixture and Λ_t do not depend on the input, so they fold into one matrix a task,

    U_t = s · (Σᵢ αᵢ Bᵢ) Λ_t    (O, R),        h = W x + U_t (A x),

and a task *is* a LoRA of rank R with down-projection A and up-projection U_t. With the up-projections' columns side by
side, U_t = [B₁ … B_N] C_t for a small matrix C_t (N·R, R) with the blocks s α_ti Λ_t. So a row may also be lifted to
the N·R columns, z = C_t A x, and then all tasks share one wide product, h = W x + [B₁ … B_N] z.

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


def _in_full(transform: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Λ as (T, 1, R, R)."""
    transform = transform.to(dtype)
    return (torch.diag_embed(transform) if transform.dim() == 2 else transform).unsqueeze(1)


def combine(transform: Tensor, mixing_TN: Tensor, temperature: float, scaling: float) -> tuple[Tensor, Tensor]:
    """Return C (T, N·R, R), mixture, Λ and scaling in one small matrix a task, and the mixture α (T, N).

    Args:
        transform: Λ, (T, R, R) or its diagonal (T, R).
        mixing_TN: the mixing logits w.
        temperature: τ.
        scaling: s.
    """
    weights_TN = mixing_weights(mixing_TN, temperature)
    scaled_TN11 = (weights_TN * scaling).view(*weights_TN.shape, 1, 1)
    return (scaled_TN11 * _in_full(transform, folding_dtype(transform.dtype))).flatten(1, 2), weights_TN


def combine_backward(
    grad_combination: Tensor, transform: Tensor, weights_TN: Tensor, temperature: float, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`combine` for Λ and w, given that for C (T, N·R, R) and the mixture α (T, N)."""
    grad_TNRR = grad_combination.reshape(*weights_TN.shape, *grad_combination.shape[-1:] * 2)
    grad_transform = (grad_TNRR * (weights_TN * scaling).view(*weights_TN.shape, 1, 1)).sum(1)
    grad_weights_TN = (grad_TNRR * _in_full(transform, weights_TN.dtype)).sum((2, 3))
    if transform.dim() == 2:
        grad_transform = grad_transform.diagonal(dim1=1, dim2=2)
    grad_logits_TN = torch._softmax_backward_data(grad_weights_TN, weights_TN, -1, weights_TN.dtype)
    return grad_transform, grad_logits_TN * (scaling / temperature)


def stack_columns(up_NOR: Tensor) -> Tensor:
    """Return [B₁ … B_N]ᵀ (N·R, O)."""
    return up_NOR.transpose(1, 2).flatten(0, 1)


def fold(up_NOR: Tensor, transform: Tensor, mixing_TN: Tensor, temperature: float, scaling: float) -> Tensor:
    """Return every task's Uᵀ (T, R, O) in :func:`folding_dtype`; arguments as :func:`combine`, and B (N, O, R).

    A product a task and not one for all: a task's bits then do not depend on how many other tasks there are.
    """
    combination = combine(transform, mixing_TN, temperature, scaling)[0]
    stacked = stack_columns(up_NOR.to(combination.dtype))
    return torch.bmm(combination.transpose(1, 2), stacked.expand(combination.shape[0], -1, -1))
