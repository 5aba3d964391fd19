"""The formula of MTL-LoRA, once.

    h = W x + s · Σᵢ softmax(w_t / τ)ᵢ Bᵢ Λ_t A x          (arXiv 2410.09437, section 3; s = lora_alpha / r)

The mixture and Λ_t do not depend on the input, so they fold into one matrix a task,

    U_t = s · (Σᵢ αᵢ Bᵢ) Λ_t    (O, R),        h = W x + U_t (A x),

and a task *is* a LoRA of rank R with down-projection A and up-projection U_t.

Axes: B batch, S sequence, I input features, O output features, R rank, T tasks, N up-projections.
"""

import torch
from torch import Tensor

__all__ = ["fold", "fold_backward", "folding_dtype", "mixing_weights"]


def folding_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that folding computes in: at least fp32, since a softmax over w / τ loses digits below it."""
    return torch.promote_types(dtype, torch.float32)


def mixing_weights(mixing_TN: Tensor, temperature: float) -> Tensor:
    """Return softmax(w_t / τ) over the up-projections, (T, N), in at least fp32."""
    return torch.softmax(mixing_TN.to(folding_dtype(mixing_TN.dtype)) / temperature, dim=-1)


def _mix(weights_TN: Tensor, up_NOR: Tensor) -> Tensor:
    """Return Σᵢ αᵢ Bᵢ for every task, (T, O, R).

    A sum of N element-wise products and not one matrix product: a task's bits then do not depend on how many
    other tasks there are, which a matrix product does not promise.
    """
    mixed_TOR = weights_TN[:, 0, None, None] * up_NOR[0]
    for index in range(1, up_NOR.shape[0]):
        mixed_TOR = torch.addcmul(mixed_TOR, weights_TN[:, index, None, None], up_NOR[index])
    return mixed_TOR


def fold(
    up_NOR: Tensor, transform: Tensor, mixing_TN: Tensor, temperature: float, scaling: float
) -> tuple[Tensor, Tensor]:
    """Fold mixture, Λ and scaling into one up-projection a task.

    Args:
        up_NOR: the shared up-projections B.
        transform: Λ, (T, R, R) or its diagonal (T, R).
        mixing_TN: the mixing logits w.
        temperature: τ.
        scaling: s.

    Returns:
        The folded Uᵀ (T, R, O) and the weights α (T, N), in :func:`folding_dtype`. U is transposed because products
        with a (R, O) right-hand side are the fast ones.
    """
    dtype = folding_dtype(up_NOR.dtype)
    up_NOR, transform = up_NOR.to(dtype), transform.to(dtype) * scaling
    weights_TN = mixing_weights(mixing_TN, temperature).to(dtype)
    mixed_TRO = _mix(weights_TN, up_NOR).transpose(1, 2)
    if transform.dim() == 3:
        return torch.bmm(transform.transpose(1, 2), mixed_TRO), weights_TN
    return (mixed_TRO * transform.unsqueeze(-1)).contiguous(), weights_TN


def fold_backward(
    grad_TRO: Tensor, up_NOR: Tensor, transform: Tensor, weights_TN: Tensor, temperature: float, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`fold` for B (N, O, R), Λ and w (T, N), given G = ∂L/∂Uᵀ (T, R, O).

    All three follow from two products with the wide axis O; with C_ti = G_t Bᵢ (R, R),
    ∂Λ_t = s Σᵢ α_ti C_tiᵀ, ∂α_ti = s ⟨C_tiᵀ, Λ_t⟩, ∂Bᵢ = s Σ_t α_ti G_tᵀ Λ_tᵀ, and the softmax's own backward for w.
    """
    dtype = weights_TN.dtype
    is_diagonal = transform.dim() == 2
    lambda_TRR = (torch.diag_embed(transform) if is_diagonal else transform).to(dtype) * scaling
    (num_tasks, r, size_out), num_ups = grad_TRO.shape, up_NOR.shape[0]
    grad_rows = grad_TRO.to(dtype).reshape(num_tasks * r, size_out)

    up_columns = up_NOR.to(dtype).transpose(0, 1).reshape(size_out, num_ups * r)
    inner_TNRR = (grad_rows @ up_columns).view(num_tasks, r, num_ups, r).permute(0, 2, 3, 1)
    grad_transform = (weights_TN[:, :, None, None] * inner_TNRR).sum(1) * scaling
    grad_weights_TN = (inner_TNRR * lambda_TRR.unsqueeze(1)).sum((2, 3))

    folding_TNRR = weights_TN[:, :, None, None] * lambda_TRR.unsqueeze(1)
    grad_up = folding_TNRR.permute(1, 2, 0, 3).reshape(num_ups * r, num_tasks * r) @ grad_rows
    grad_up_NOR = grad_up.view(num_ups, r, size_out).transpose(1, 2)

    centred_TN = grad_weights_TN - (weights_TN * grad_weights_TN).sum(-1, keepdim=True)
    if is_diagonal:
        grad_transform = grad_transform.diagonal(dim1=1, dim2=2)
    return grad_up_NOR, grad_transform, weights_TN * centred_TN / temperature
