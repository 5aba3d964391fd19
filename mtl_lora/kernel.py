"""The adapted linear map as one hand-written autograd function.

Forward: ``y = x Wᵀ + b``, then ``y += (drop(x) Aᵀ) Uᵀ`` accumulated in place. Saved for the backward: the input, the
rank-R activations and, with dropout, a mask of one byte an element. The folded matrices are made again in the
backward, where the gradients of B, Λ and w follow from that of U by small products (functional.fold_backward).
Without gradients the same forward runs outside of autograd.

A layer's rows come in one of three layouts, told apart by the ids' dimension:
* ``()``: one task, x is (1, M, I);
* ``(B,)``: a task a row, x is (B, S, I);
* ``(M, 1)``: a task a token, x is (M, I). Rank-R activations are put into their task's block of a (M, T·R) matrix
  whose product with the stacked U (T·R, O) is one dense product; no shape depends on the data.

Axes: B batch, S sequence, M rows (B·S), I in, O out, R rank, T tasks, N up-projections, E folded matrices.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_lora.functional import Fold, fold, fold_backward

__all__ = ["Settings", "adapted_linear", "dropout_mask", "select_folded"]


class Settings(NamedTuple):
    """The numbers of a layer that are no tensors.

    Attributes:
        temperature: τ.
        scaling: s.
        dropout: probability of dropping an input feature; 0 outside of training.
        compute_dtype: type of the products with x.
        trainable_tasks: ids of the tasks whose Λ and w get gradients; None for all.
        is_transposed: whether the weight is stored as (I, O), as GPT-2's Conv1D does.
    """

    temperature: float
    scaling: float
    dropout: float
    compute_dtype: torch.dtype
    trainable_tasks: tuple[int, ...] | None = None
    is_transposed: bool = False


def dropout_mask(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """Return a random mask of x's shape in int8 (1 where a feature is kept) and the factor 1 / P(kept).

    On the CPU one 64-bit draw of torch's default generator makes four decisions of 16 bits, several times faster than
    a draw each. The probability is rounded to a multiple of 2⁻¹⁶, and the factor belongs to the rounded one, so the
    expectation is exact.
    """
    if x.device.type != "cpu":
        mask = torch.empty(x.shape, dtype=torch.int8, device=x.device).bernoulli_(1 - probability)
        return mask, 1 / (1 - probability)
    dropped_of_65536 = min(round(probability * 65536), 65535)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    lanes = draws.view(torch.int16)[: x.numel()].view(x.shape)
    mask = (lanes >= dropped_of_65536 - 32768).view(torch.int8)
    return mask, 65536 / (65536 - dropped_of_65536)


def _gathers_first(ids: Tensor, num_tasks: int) -> bool:
    """Whether to take the rows' Λ and w before folding (fewer rows than tasks) or to fold all tasks."""
    return ids.dim() == 0 or (ids.dim() == 1 and ids.shape[0] < num_tasks)


def select_folded(folded_TRO: Tensor, ids: Tensor) -> Tensor:
    """Return the folded matrices in the layout that the ids ask for: (1, R, O), (B, R, O) or (T, R, O)."""
    if ids.dim() == 2:
        return folded_TRO
    return folded_TRO.index_select(0, ids.reshape(-1))


def _spread(down_MR: Tensor, ids_M1: Tensor, num_tasks: int) -> Tensor:
    """Put each row's R activations into its task's block, (M, T·R), zeros elsewhere."""
    rows, rank = down_MR.shape
    blocks_MTR = down_MR.new_zeros(rows, num_tasks, rank)
    index = ids_M1.unsqueeze(-1).expand(rows, 1, rank)
    return blocks_MTR.scatter(1, index, down_MR.unsqueeze(1)).flatten(1)


def _collect(blocks: Tensor, ids_M1: Tensor, rank: int) -> Tensor:
    """Return each row's own block of (M, T·R) as (M, R)."""
    blocks_MTR = blocks.view(blocks.shape[0], -1, rank)
    index = ids_M1.unsqueeze(-1).expand(blocks.shape[0], 1, rank)
    return blocks_MTR.gather(1, index).squeeze(1)


def accumulate_up(y: Tensor, down: Tensor, folded: Tensor, ids: Tensor) -> Tensor:
    """Add ``down Uᵀ`` to y in place and return y; ``folded`` is Uᵀ (E, R, O), layouts as in the module's docstring."""
    if ids.dim() == 2:
        return y.addmm_(_spread(down, ids, folded.shape[0]), folded.flatten(0, 1))
    if folded.shape[0] == 1:
        y[0].addmm_(down[0], folded[0])
        return y
    return y.baddbmm_(down, folded)


def _project_down(x: Tensor, down_RI: Tensor) -> Tensor:
    """Return ``x Aᵀ`` as ``(A xᵀ)ᵀ``, (..., R): on CPUs products with the thin factor on the left are faster."""
    return (down_RI @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])


def _as_OI(weight: Tensor, settings: Settings) -> Tensor:
    """Return the weight as (O, I) in the compute type. Only the parameter itself is saved for the backward, since a
    view of it would keep a ZeRO-3 parameter's gathered storage alive."""
    return (weight.t() if settings.is_transposed else weight).to(settings.compute_dtype)


def _base_output(x: Tensor, weight: Tensor, bias_O: Tensor | None, settings: Settings) -> Tensor:
    bias_O = None if bias_O is None else bias_O.to(settings.compute_dtype)
    return F.linear(x, _as_OI(weight, settings), bias_O)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias_O: Tensor | None,
    down_RI: Tensor,
    up_NOR: Tensor,
    transform: Tensor,
    mixing_TN: Tensor,
    ids: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, float]:
    """Return y and what its backward needs: x in the compute type, the dropout mask, x Aᵀ, 1 / P(kept)."""
    dtype = settings.compute_dtype
    x = x.to(dtype)
    y = _base_output(x, weight, bias_O, settings)
    mask, keep_scale = dropout_mask(x, settings.dropout) if settings.dropout else (None, 1.0)
    down = _project_down(x if mask is None else x * mask, down_RI.to(dtype))
    if mask is not None:
        down.mul_(keep_scale)
    folded = _fold_for(up_NOR, transform, mixing_TN, ids, settings)[0]
    accumulate_up(y, down, _lay_out(folded, ids, transform.shape[0], dtype), ids)
    return y, x, mask, down, keep_scale


class _AdaptedLinear(torch.autograd.Function):
    """See the module's docstring; tensors first, then ids and settings."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias_O: Tensor | None,
        down_RI: Tensor,
        up_NOR: Tensor,
        transform: Tensor,
        mixing_TN: Tensor,
        ids: Tensor,
        settings: Settings,
    ) -> Tensor:
        """Return y in the compute type, of x's shape but for the last axis O."""
        parameters = (down_RI, up_NOR, transform, mixing_TN)
        y, x, mask, down, ctx.keep_scale = _forward(x, weight, bias_O, *parameters, ids, settings)
        ctx.save_for_backward(x, mask, down, weight, *parameters, ids)
        ctx.settings, ctx.has_bias = settings, bias_O is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, W, b, A, B, Λ and w, each only where it is asked for."""
        x, mask, down, weight, down_RI, up_NOR, transform, mixing_TN, ids = ctx.saved_tensors
        settings: Settings = ctx.settings
        dtype, needs, num_tasks = settings.compute_dtype, ctx.needs_input_grad, transform.shape[0]
        folded, transform_E = _fold_for(up_NOR, transform, mixing_TN, ids, settings)
        rows_MI, grad_rows_MO = x.flatten(0, -2), grad_y.flatten(0, -2)

        grad_x = grad_weight = grad_bias = grad_down_RI = grad_up = grad_transform = grad_mixing = None
        if needs[0] or needs[3]:
            grad_down_RM = _down_gradient(grad_y, _lay_out(folded, ids, num_tasks, dtype), ids)
            if mask is not None:
                grad_down_RM.mul_(ctx.keep_scale)
        if needs[3]:
            dropped_MI = rows_MI if mask is None else rows_MI * mask.view_as(rows_MI)
            grad_down_RI = (grad_down_RM @ dropped_MI).to(down_RI.dtype)
        if needs[0]:
            grad_x = grad_rows_MO @ _as_OI(weight, settings)
            if mask is None:
                grad_x.addmm_(grad_down_RM.t(), down_RI.to(dtype))
            else:
                grad_x.add_((grad_down_RM.t() @ down_RI.to(dtype)).mul_(mask.view_as(grad_x)))
            grad_x = grad_x.view_as(x)
        if needs[1]:
            grad_weight = grad_rows_MO.t() @ rows_MI
            grad_weight = (grad_weight.t() if settings.is_transposed else grad_weight).to(weight.dtype)
        if ctx.has_bias and needs[2]:
            grad_bias = grad_rows_MO.sum(0)
        if needs[4] or needs[5] or needs[6]:
            grad_folded = _folded_gradient(grad_y, down, ids, folded.weights_TN.dtype, num_tasks)
            grads = fold_backward(grad_folded, folded, transform_E, settings.temperature, settings.scaling)
            grad_up, grad_transform, grad_mixing = _to_parameters(grads, up_NOR, transform, mixing_TN, ids, settings)
        return grad_x, grad_weight, grad_bias, grad_down_RI, grad_up, grad_transform, grad_mixing, None, None


def _fold_for(
    up_NOR: Tensor, transform: Tensor, mixing_TN: Tensor, ids: Tensor, settings: Settings
) -> tuple[Fold, Tensor]:
    """Return the fold over the rows or over all tasks, whichever are fewer, and the Λ that it is made of."""
    if _gathers_first(ids, transform.shape[0]):
        index = ids.reshape(-1)
        transform, mixing_TN = transform.index_select(0, index), mixing_TN.index_select(0, index)
    return fold(up_NOR, transform, mixing_TN, settings.temperature, settings.scaling), transform


def _lay_out(folded: Fold, ids: Tensor, num_tasks: int, dtype: torch.dtype) -> Tensor:
    """Return the folded matrices as the layout of the rows asks for, in the compute type."""
    up_ERO = folded.up_TRO.to(dtype)
    return up_ERO if _gathers_first(ids, num_tasks) else select_folded(up_ERO, ids)


def _down_gradient(grad_y: Tensor, folded: Tensor, ids: Tensor) -> Tensor:
    """Return the gradient of the rank-R activations, ``(grad_y U)ᵀ`` (R, M); thin factors stand on the left."""
    if ids.dim() == 2:
        return _collect(grad_y @ folded.flatten(0, 1).t(), ids, folded.shape[1]).t()
    if folded.shape[0] == 1:
        return folded[0] @ grad_y[0].t()
    return torch.bmm(folded, grad_y.transpose(1, 2)).transpose(0, 1).flatten(1)


def _folded_gradient(grad_y: Tensor, down: Tensor, ids: Tensor, dtype: torch.dtype, num_tasks: int) -> Tensor:
    """Return Uᵀ's gradient ``downᵀ grad_y`` over rows (E = B or 1) or over all tasks (E = T), (E, R, O)."""
    if ids.dim() == 2:
        return (_spread(down, ids, num_tasks).t() @ grad_y).view(num_tasks, down.shape[-1], -1)
    grad_rows = torch.bmm(down.transpose(1, 2), grad_y)
    if _gathers_first(ids, num_tasks):
        return grad_rows
    grad_tasks = torch.zeros((num_tasks, *grad_rows.shape[1:]), dtype=dtype, device=grad_rows.device)
    return grad_tasks.index_add_(0, ids, grad_rows.to(dtype))


def _to_parameters(
    grads: tuple[Tensor, Tensor, Tensor],
    up_NOR: Tensor,
    transform: Tensor,
    mixing_TN: Tensor,
    ids: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the fold's gradients to the parameters' shapes and types; frozen tasks get exact zeros."""
    grad_up, grad_transform, grad_mixing = grads
    if _gathers_first(ids, transform.shape[0]):
        index = ids.reshape(-1)
        grad_transform = grad_transform.new_zeros(transform.shape).index_add_(0, index, grad_transform)
        grad_mixing = grad_mixing.new_zeros(mixing_TN.shape).index_add_(0, index, grad_mixing)
    if settings.trainable_tasks is not None:
        kept = torch.zeros(transform.shape[0], dtype=torch.bool, device=transform.device)
        kept[list(settings.trainable_tasks)] = True
        grad_transform = grad_transform * kept.view(-1, *[1] * (transform.dim() - 1))
        grad_mixing = grad_mixing * kept.unsqueeze(-1)
    return grad_up.to(up_NOR.dtype), grad_transform.to(transform.dtype), grad_mixing.to(mixing_TN.dtype)


def adapted_linear(*tensors: Any) -> Tensor:
    """Apply the adapted linear map; arguments as :class:`_AdaptedLinear`'s forward.

    Traced by ``torch.compile`` it is the same formula in plain operations, which the compiler differentiates and
    fuses by itself.
    """
    if torch.compiler.is_compiling():
        return _plain(*tensors)
    if not torch.is_grad_enabled():
        return _forward(*tensors)[0]
    result: Tensor = _AdaptedLinear.apply(*tensors)
    return result


def _plain(
    x: Tensor,
    weight: Tensor,
    bias_O: Tensor | None,
    down_RI: Tensor,
    up_NOR: Tensor,
    transform: Tensor,
    mixing_TN: Tensor,
    ids: Tensor,
    settings: Settings,
) -> Tensor:
    """The same map without in-place operations, for tracing."""
    dtype = settings.compute_dtype
    x = x.to(dtype)
    y = _base_output(x, weight, bias_O, settings)
    down = F.linear(F.dropout(x, settings.dropout, training=settings.dropout > 0), down_RI.to(dtype))
    if settings.trainable_tasks is not None:
        kept = torch.zeros(transform.shape[0], dtype=torch.bool, device=x.device)
        kept[list(settings.trainable_tasks)] = True
        transform = torch.where(kept.view(-1, *[1] * (transform.dim() - 1)), transform, transform.detach())
        mixing_TN = torch.where(kept.unsqueeze(-1), mixing_TN, mixing_TN.detach())
    folded = _lay_out(_fold_for(up_NOR, transform, mixing_TN, ids, settings)[0], ids, transform.shape[0], dtype)
    if ids.dim() == 2:
        return y + _spread(down, ids, folded.shape[0]) @ folded.flatten(0, 1)
    return torch.baddbmm(y, down, folded)
