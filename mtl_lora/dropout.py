"""Dropout of the low-rank path: the mask, and the thin products with an input that it thins out.

A mask is one byte an element, and a masked input is never held whole on a CPU: products run over blocks of rows whose
masked copies fit its cache. Axes: M rows, I in, R rank.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["add_input_gradient", "down_weight_gradient", "dropout_mask", "project_down"]

_BUFFER_ELEMENTS = 2**18
_buffers = threading.local()


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
    mask = torch.empty(x.shape, dtype=torch.bool)
    flat = mask.view(-1)
    for start in range(0, x.numel(), 4 * _BUFFER_ELEMENTS):
        part = flat[start : start + 4 * _BUFFER_ELEMENTS]
        draws = _buffer((part.numel() + 3) // 4, torch.int64, x.device).random_(-(2**63), None)
        torch.ge(draws.view(torch.int16)[: part.numel()], dropped_of_65536 - 32768, out=part)
    mask = mask.view(torch.int8)
    return mask, 65536 / (65536 - dropped_of_65536)


def _buffer(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory for a moment's use; on the CPU the same each time, until the thread's next call.

    What a CPU allocator hands out for a large tensor is often fresh memory, and first touching its pages costs more
    than the element-wise operation that they are for.
    """
    if device.type != "cpu" or size > _BUFFER_ELEMENTS:
        return torch.empty(size, dtype=dtype, device=device)
    kept: Tensor | None = getattr(_buffers, str(dtype), None)
    if kept is None:
        with torch.inference_mode(False):
            kept = torch.empty(_BUFFER_ELEMENTS, dtype=dtype)
        if type(kept) is Tensor:  # not a stand-in of a tracing mode
            setattr(_buffers, str(dtype), kept)
    return kept[:size]


def _row_blocks(x_MI: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows with a buffer of each block's shape: small ones on the CPU, all rows elsewhere."""
    rows, size = x_MI.shape
    step = max(1, _BUFFER_ELEMENTS // max(size, 1)) if x_MI.device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        yield slice(start, start + count), _buffer(count * size, x_MI.dtype, x_MI.device).view(count, size)


def project_down(x_MI: Tensor, down_RI: Tensor, mask_MI: Tensor | None = None) -> Tensor:
    """Return ``A drop(x)ᵀ`` (R, M): on CPUs products with the thin factor on the left are faster."""
    if mask_MI is None:
        return down_RI @ x_MI.t()
    down_RM = x_MI.new_empty(down_RI.shape[0], x_MI.shape[0])
    for rows, buffer in _row_blocks(x_MI):
        torch.mm(down_RI, torch.mul(x_MI[rows], mask_MI[rows], out=buffer).t(), out=down_RM[:, rows])
    return down_RM


def down_weight_gradient(grad_down_RM: Tensor, x_MI: Tensor, mask_MI: Tensor | None) -> Tensor:
    """Return the gradient of A (R, I)."""
    if mask_MI is None:
        return grad_down_RM @ x_MI
    grad_RI = grad_down_RM.new_zeros(grad_down_RM.shape[0], x_MI.shape[1])
    for rows, buffer in _row_blocks(x_MI):
        grad_RI.addmm_(grad_down_RM[:, rows], torch.mul(x_MI[rows], mask_MI[rows], out=buffer))
    return grad_RI


def add_input_gradient(grad_x_MI: Tensor, grad_down_RM: Tensor, down_RI: Tensor, mask_MI: Tensor | None) -> None:
    """Add the low-rank path's gradient of x in place."""
    if mask_MI is None:
        grad_x_MI.addmm_(grad_down_RM.t(), down_RI)
        return
    for rows, buffer in _row_blocks(grad_x_MI):
        torch.mm(grad_down_RM.t()[rows], down_RI, out=buffer)
        grad_x_MI[rows].add_(buffer.mul_(mask_MI[rows]))
