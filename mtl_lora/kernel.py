"""The adapted linear map as one hand-written autograd function.

Forward: ``y = x Wᵀ + b``, then ``y += z [B₁ … B_N]ᵀ`` accumulated in place, where z (M, N·R) is ``drop(x) Aᵀ`` times
the small matrix C of each row's task (functional.combine, in at least fp32). All that depends on tasks is of rank size;
the products with the wide axes are the same few for any number and any mixture of tasks. Saved for the backward: the
input, the rank-R activations and, with dropout, a mask of one byte an element. Without gradients the same runs outside
of autograd.

A layer's rows come in one of three layouts, told apart by the ids' dimension:
* ``()``: one task, x is (1, M, I);
* ``(B,)``: a task a row, x is (B, S, I);
* ``(M, 1)``: a task a token, x is (M, I). Rank-R activations are put into their task's block of a (M, T·R) matrix
  whose product with the stacked Cᵀ (T·R, N·R) is one dense product; no shape depends on the data.

Axes: B batch, S sequence, M rows (B·S), I in, O out, R rank, T tasks, N up-projections, E small matrices.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora.dropout import add_input_gradient, down_weight_gradient, dropout_mask, project_down
from mtl_lora.errors import MTLLoRAError
from mtl_lora.functional import combine, combine_backward, stack_columns

__all__ = ["accumulate_up", "adapted_linear", "select_tasks"]


class _Settings(NamedTuple):
    """The arguments of :func:`adapted_linear` that are no tensors."""

    temperature: float
    scaling: float
    dropout: float
    compute_dtype: torch.dtype
    trainable_tasks: tuple[int, ...] | None
    is_transposed: bool


def _gathers_first(ids: Tensor, num_tasks: int) -> bool:
    """Whether to take the rows' Λ and w before combining them (fewer rows than tasks) or to combine all tasks'."""
    return ids.dim() == 0 or (ids.dim() == 1 and ids.shape[0] < num_tasks)


def select_tasks(matrices_TRX: Tensor, ids: Tensor) -> Tensor:
    """Return the tasks' matrices in the layout that the ids ask for, E = 1, B or T."""
    if ids.dim() == 2:
        return matrices_TRX
    return matrices_TRX.index_select(0, ids.reshape(-1))


def _spread(down_MR: Tensor, ids_M1: Tensor, num_tasks: int) -> Tensor:
    """Put each row's R activations into its task's block, (M, T·R), zeros elsewhere."""
    rows, rank = down_MR.shape
    blocks_MTR = down_MR.new_zeros(rows, num_tasks, rank)
    index = ids_M1.unsqueeze(-1).expand(rows, 1, rank)
    return blocks_MTR.scatter(1, index, down_MR.unsqueeze(1)).flatten(1)


def accumulate_up(y: Tensor, down: Tensor, folded: Tensor, ids: Tensor) -> Tensor:
    """Add ``down Uᵀ`` to y in place and return y; ``folded`` is Uᵀ (E, R, O), layouts as in the module's docstring."""
    if ids.dim() == 2:
        return y.addmm_(_spread(down, ids, folded.shape[0]), folded.flatten(0, 1))
    if folded.shape[0] == 1:
        y[0].addmm_(down[0], folded[0])
        return y
    return y.baddbmm_(down, folded)


def _as_OI(weight: Tensor, settings: _Settings) -> Tensor:
    """Return the weight as (O, I) in the compute type. Only the parameter itself is saved for the backward, since a
    view of it would keep a ZeRO-3 parameter's gathered storage alive."""
    return (weight.t() if settings.is_transposed else weight).to(settings.compute_dtype)


def _base_output(x: Tensor, weight: Tensor | None, bias_O: Tensor | None, settings: _Settings) -> Tensor:
    if weight is None:
        raise MTLLoRAError("a linear map needs its weight or its base output, got neither; give one of them")
    bias_O = None if bias_O is None else bias_O.to(settings.compute_dtype)
    return F.linear(x, _as_OI(weight, settings), bias_O)


def _combine_for(transform: Tensor, mixing_TN: Tensor, ids: Tensor, settings: _Settings) -> tuple[Tensor, ...]:
    """Return C and α over the rows or over all tasks, whichever are fewer, and the Λ that they are made of."""
    if _gathers_first(ids, transform.shape[0]):
        index = ids.reshape(-1)
        transform, mixing_TN = transform.index_select(0, index), mixing_TN.index_select(0, index)
    return (*combine(transform, mixing_TN, settings.temperature, settings.scaling), transform)


def _lift(down: Tensor, combination: Tensor, ids: Tensor) -> Tensor:
    """Return z (M, N·R) for the rank-R activations in the rows' layout and C in the same (:func:`select_tasks`)."""
    if ids.dim() == 2:
        return _spread(down, ids, combination.shape[0]) @ combination.transpose(1, 2).flatten(0, 1)
    return torch.bmm(down, combination.transpose(1, 2)).flatten(0, 1)


def _lift_backward(
    grad_z_KM: Tensor, down: Tensor, combination: Tensor, ids: Tensor, needs_combination: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the rank-R activations (R, M), and where asked for of C, over rows or tasks."""
    transposed = combination.transpose(1, 2)
    if ids.dim() == 2:
        num_tasks, rank, width = transposed.shape
        blocks_TRM = (transposed.flatten(0, 1) @ grad_z_KM).view(num_tasks, rank, -1)
        grad_down_RM = blocks_TRM.gather(0, ids.view(1, 1, -1).expand(1, rank, -1)).squeeze(0)
        if not needs_combination:
            return grad_down_RM, None
        grad_KTR = (grad_z_KM @ _spread(down, ids, num_tasks)).view(width, num_tasks, rank)
        return grad_down_RM, grad_KTR.transpose(0, 1)
    grad_z_BKS = grad_z_KM.view(-1, *down.shape[:2]).transpose(0, 1)
    grad_down_RM = torch.bmm(transposed, grad_z_BKS).transpose(0, 1).flatten(1)
    return grad_down_RM, torch.bmm(grad_z_BKS, down) if needs_combination else None


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias_O: Tensor | None,
    down_RI: Tensor,
    up_NOR: Tensor,
    transform: Tensor,
    mixing_TN: Tensor,
    ids: Tensor,
    settings: _Settings,
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, float]:
    """Return y and what its backward needs: x in the compute type, the dropout mask, x Aᵀ (R, M), 1 / P(kept)."""
    dtype = settings.compute_dtype
    x = x.to(dtype)
    y = _base_output(x, weight, bias_O, settings) if base is None else base.to(dtype, copy=True)
    mask, keep_scale = dropout_mask(x, settings.dropout) if settings.dropout else (None, 1.0)
    down_RM = project_down(x.flatten(0, -2), down_RI.to(dtype), None if mask is None else mask.flatten(0, -2))
    if mask is not None:
        down_RM.mul_(keep_scale)
    combination = _select_for(_combine_for(transform, mixing_TN, ids, settings)[0], ids, transform.shape[0])
    lifted = _lift(_as_rows(down_RM, x, combination.dtype), combination, ids).to(dtype)
    y.view(lifted.shape[0], y.shape[-1]).addmm_(lifted, stack_columns(up_NOR.to(dtype)))
    return y, x, mask, down_RM, keep_scale


class _AdaptedLinear(torch.autograd.Function):
    """See the module's docstring; tensors first, then ids and settings."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias_O: Tensor | None,
        down_RI: Tensor,
        up_NOR: Tensor,
        transform: Tensor,
        mixing_TN: Tensor,
        ids: Tensor,
        settings: _Settings,
        base: Tensor | None = None,
    ) -> Tensor:
        """Return y in the compute type, of x's shape but for the last axis O."""
        parameters = (down_RI, up_NOR, transform, mixing_TN)
        y, x, mask, down_RM, ctx.keep_scale = _forward(x, weight, bias_O, *parameters, ids, settings, base)
        ctx.save_for_backward(x, mask, down_RM, weight, *parameters, ids)
        ctx.settings, ctx.has_bias = settings, bias_O is not None
        ctx.base_dtype = None if base is None else base.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, W, b, A, B, Λ, w and W x + b, each only where it is asked for."""
        x, mask, down_RM, weight, down_RI, up_NOR, transform, mixing_TN, ids = ctx.saved_tensors
        settings: _Settings = ctx.settings
        dtype, needs = settings.compute_dtype, ctx.needs_input_grad
        x_MI, grad_y_MO = x.flatten(0, -2), grad_y.flatten(0, -2)
        mask_MI = None if mask is None else mask.flatten(0, -2)

        grad_x = grad_weight = grad_bias = grad_down_RI = grad_up = grad_transform = grad_mixing = None
        if needs[0]:  # through a layer of its own W x + b has its gradient from there
            grad_x = torch.zeros_like(x_MI) if weight is None else grad_y_MO @ _as_OI(weight, settings)
        if needs[1]:
            grad_weight = grad_y_MO.t() @ x_MI
            grad_weight = (grad_weight.t() if settings.is_transposed else grad_weight).to(weight.dtype)
        if ctx.has_bias and needs[2]:
            grad_bias = grad_y_MO.sum(0)
        if needs[0] or any(needs[3:7]):
            combination_E, weights_EN, transform_E = _combine_for(transform, mixing_TN, ids, settings)
            combination = _select_for(combination_E, ids, transform.shape[0])
            down = _as_rows(down_RM, x, combination.dtype)
            grad_z_KM = (stack_columns(up_NOR.to(dtype)) @ grad_y_MO.t()).to(combination.dtype)
            grads = _lift_backward(grad_z_KM, down, combination, ids, needs[5] or needs[6])
            grad_down_RM, grad_combination = grads[0].to(dtype), grads[1]
            if mask is not None:
                grad_down_RM.mul_(ctx.keep_scale)
            if grad_x is not None:
                add_input_gradient(grad_x, grad_down_RM, down_RI.to(dtype), mask_MI)
                grad_x = grad_x.view_as(x)
            if needs[3]:
                grad_down_RI = down_weight_gradient(grad_down_RM, x_MI, mask_MI).to(down_RI.dtype)
            if needs[4]:
                grad_stacked = (_lift(down, combination, ids).to(dtype).t() @ grad_y_MO).to(up_NOR.dtype)
                grad_up = grad_stacked.view(up_NOR.shape[0], -1, grad_stacked.shape[1]).transpose(1, 2)
            if grad_combination is not None:
                grad_E = _sum_over_rows(grad_combination, ids, transform.shape[0])
                small = combine_backward(grad_E, transform_E, weights_EN, settings.temperature, settings.scaling)
                grad_transform, grad_mixing = _to_parameters(small, transform, mixing_TN, ids, settings)
        grad_base = grad_y.to(ctx.base_dtype) if needs[9] else None
        return grad_x, grad_weight, grad_bias, grad_down_RI, grad_up, grad_transform, grad_mixing, None, None, grad_base


def _as_rows(down_RM: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rank-R activations in x's layout, (B, S, R) or (M, R), in the small matrices' type."""
    return down_RM.to(dtype).t().view(*x.shape[:-1], down_RM.shape[0])


def _select_for(combination: Tensor, ids: Tensor, num_tasks: int) -> Tensor:
    return combination if _gathers_first(ids, num_tasks) else select_tasks(combination, ids)


def _sum_over_rows(grad: Tensor, ids: Tensor, num_tasks: int) -> Tensor:
    """Return the gradient of the small matrices as they were made: over the rows, or their sums over the tasks."""
    if ids.dim() == 2 or _gathers_first(ids, num_tasks):
        return grad
    return grad.new_zeros(num_tasks, *grad.shape[1:]).index_add_(0, ids, grad)


def _to_parameters(
    grads: tuple[Tensor, Tensor], transform: Tensor, mixing_TN: Tensor, ids: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor]:
    """Bring the gradients of Λ and w to the parameters' shapes and types; frozen tasks get exact zeros."""
    grad_transform, grad_mixing = grads
    if _gathers_first(ids, transform.shape[0]):
        index = ids.reshape(-1)
        grad_transform = grad_transform.new_zeros(transform.shape).index_add_(0, index, grad_transform)
        grad_mixing = grad_mixing.new_zeros(mixing_TN.shape).index_add_(0, index, grad_mixing)
    if settings.trainable_tasks is not None:
        kept = torch.zeros(transform.shape[0], dtype=torch.bool, device=transform.device)
        kept[list(settings.trainable_tasks)] = True
        grad_transform = grad_transform * kept.view(-1, *[1] * (transform.dim() - 1))
        grad_mixing = grad_mixing * kept.unsqueeze(-1)
    return grad_transform.to(transform.dtype), grad_mixing.to(mixing_TN.dtype)


def adapted_linear(
    x: Tensor,
    weight: Tensor | None,
    bias_O: Tensor | None,
    *,
    down_RI: Tensor,
    up_NOR: Tensor,
    transform: Tensor,
    mixing_TN: Tensor,
    ids: Tensor,
    temperature: float,
    scaling: float,
    dropout: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    trainable_tasks: tuple[int, ...] | None = None,
    is_transposed: bool = False,
    base: Tensor | None = None,
) -> Tensor:
    """Return h = W x + b + s Σᵢ softmax(w_t / τ)ᵢ Bᵢ Λ_t A drop(x), each row with its task t (arXiv 2410.09437).

    Traced by ``torch.compile`` it is the same formula in plain operations, which the compiler differentiates and
    fuses by itself.

    Args:
        x: (1, M, I), (B, S, I) or (M, I), the layout that the ids ask for; see the module's docstring.
        weight: W (O, I), or (I, O) where ``is_transposed``; gets a gradient only where it asks for one. None where
            ``base`` is given.
        bias_O: b, or None.
        down_RI: A.
        up_NOR: B.
        transform: Λ (T, R, R), or its diagonal (T, R).
        mixing_TN: the mixing logits w.
        ids: int64 in [0, T), of shape (), (B,) or (M, 1).
        temperature: τ.
        scaling: s.
        dropout: probability of dropping an input feature of the low-rank path, in [0, 1); 0 outside of training.
        compute_dtype: type of the products with x, and of the result; None is x's.
        trainable_tasks: ids of the tasks whose Λ and w get gradients; None for all.
        is_transposed: whether the weight is stored as (I, O), as GPT-2's Conv1D does.
        base: W x + b, computed by a layer whose weight is no plain matrix; gets its gradient.

    Returns:
        h in the compute type, of x's shape but for the last axis O.
    """
    settings = _Settings(temperature, scaling, dropout, compute_dtype or x.dtype, trainable_tasks, is_transposed)
    tensors = (x, weight, bias_O, down_RI, up_NOR, transform, mixing_TN, ids)
    if torch.compiler.is_compiling():
        return _plain(*tensors, settings, base)
    if not torch.is_grad_enabled():
        return _forward(*tensors, settings, base)[0]
    result: Tensor = _AdaptedLinear.apply(*tensors, settings, base)
    return result


def _plain(
    x: Tensor,
    weight: Tensor | None,
    bias_O: Tensor | None,
    down_RI: Tensor,
    up_NOR: Tensor,
    transform: Tensor,
    mixing_TN: Tensor,
    ids: Tensor,
    settings: _Settings,
    base: Tensor | None = None,
) -> Tensor:
    """The same map without in-place operations, for tracing."""
    dtype = settings.compute_dtype
    x = x.to(dtype)
    y = _base_output(x, weight, bias_O, settings) if base is None else base.to(dtype)
    down = F.linear(F.dropout(x, settings.dropout, training=settings.dropout > 0), down_RI.to(dtype))
    if settings.trainable_tasks is not None:
        kept = torch.zeros(transform.shape[0], dtype=torch.bool, device=x.device)
        kept[list(settings.trainable_tasks)] = True
        transform = torch.where(kept.view(-1, *[1] * (transform.dim() - 1)), transform, transform.detach())
        mixing_TN = torch.where(kept.unsqueeze(-1), mixing_TN, mixing_TN.detach())
    combination = _select_for(_combine_for(transform, mixing_TN, ids, settings)[0], ids, transform.shape[0])
    lifted = _lift(down.to(combination.dtype), combination, ids).to(dtype)
    return y + (lifted @ stack_columns(up_NOR.to(dtype))).view_as(y)
