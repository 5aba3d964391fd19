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
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold mixture, Λ and scaling into one up-projection a task.

    Args:
        up_NOR: the shared up-projections B.
        transform: Λ, (T, R, R) or its diagonal (T, R).
        mixing_TN: the mixing logits w.
        temperature: τ.
        scaling: s.

    Returns:
        The folded Uᵀ (T, R, O), the mixed Σᵢ αᵢ Bᵢ (T, O, R) and the weights α (T, N), in :func:`folding_dtype`.
        U is returned transposed because products with a (R, O) right-hand side are the fast ones.
    """
    dtype = folding_dtype(up_NOR.dtype)
    up_NOR, transform = up_NOR.to(dtype), transform.to(dtype)
    weights_TN = mixing_weights(mixing_TN, temperature).to(dtype)
    mixed_TOR = _mix(weights_TN, up_NOR)
    if transform.dim() == 3:
        folded_TRO = torch.bmm((transform * scaling).transpose(1, 2), mixed_TOR.transpose(1, 2))
    else:
        folded_TRO = (mixed_TOR * (transform * scaling).unsqueeze(1)).transpose(1, 2).contiguous()
    return folded_TRO, mixed_TOR, weights_TN


def fold_backward(
    grad_TRO: Tensor,
    up_NOR: Tensor,
    transform: Tensor,
    mixed_TOR: Tensor,
    weights_TN: Tensor,
    temperature: float,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`fold` for B (N, O, R), Λ and w (T, N), given that of Uᵀ (T, R, O)."""
    dtype = weights_TN.dtype
    up_NOR, transform, grad_TRO = up_NOR.to(dtype), transform.to(dtype), grad_TRO.to(dtype)
    grad_TOR = grad_TRO.transpose(1, 2)
    if transform.dim() == 3:
        grad_transform = torch.bmm(grad_TRO, mixed_TOR).transpose(1, 2) * scaling
        grad_mixed_TOR = torch.bmm(grad_TOR, (transform * scaling).transpose(1, 2))
    else:
        grad_transform = (mixed_TOR * grad_TOR).sum(1) * scaling
        grad_mixed_TOR = grad_TOR * (transform * scaling).unsqueeze(1)
    grad_mixed = grad_mixed_TOR.reshape(weights_TN.shape[0], -1)
    grad_up_NOR = (weights_TN.t() @ grad_mixed).view_as(up_NOR)
    grad_weights_TN = grad_mixed @ up_NOR.reshape(weights_TN.shape[1], -1).t()
    centred_TN = grad_weights_TN - (weights_TN * grad_weights_TN).sum(-1, keepdim=True)
    return grad_up_NOR, grad_transform, weights_TN * centred_TN / temperature
