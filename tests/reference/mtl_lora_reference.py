"""The adapted linear maps as nested loops over rows, up-projections and ranks; gradients come from autograd."""

import torch
from torch import Tensor


def _softmax(logits: Tensor, temperature: float) -> list[Tensor]:
    exponentials = [torch.exp((logit - logits.detach().max()) / temperature) for logit in logits]
    total = sum(exponentials)
    return [value / total for value in exponentials]


def mtl_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    transform: Tensor,
    mixing: Tensor,
    ids: list[int],
    temperature: float,
    scaling: float,
) -> Tensor:
    """h = W x + s Σᵢ softmax(w_t/τ)ᵢ Bᵢ Λ_t A x, for x (M, I) and one id a row; (M, O)."""
    rows = []
    for row, task in zip(x, ids, strict=True):
        inner = torch.stack([sum(a * value for a, value in zip(line, row, strict=True)) for line in down])
        if transform.dim() == 3:
            rotated = [sum(entry * inner[k] for k, entry in enumerate(line)) for line in transform[task]]
        else:
            rotated = [entry * inner[k] for k, entry in enumerate(transform[task])]
        weights = _softmax(mixing[task], temperature)
        outputs = []
        for o in range(weight.shape[0]):
            total = sum(weight[o, i] * row[i] for i in range(weight.shape[1]))
            if bias is not None:
                total = total + bias[o]
            for i, share in enumerate(weights):
                for k, value in enumerate(rotated):
                    total = total + scaling * share * up[i, o, k] * value
            outputs.append(total)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
) -> Tensor:
    """h = W' x with W' = W + s B A (arXiv 2106.09685); with magnitudes m (O,), row o of W' is scaled to the length m_o.

    The latter is DoRA (arXiv 2402.09353, equation 5), whose gradient takes the length as a constant (equation 11).
    """
    rows = []
    for row in x:
        outputs = []
        for o, line in enumerate(weight):
            changed = [w + scaling * sum(up[o, k] * down[k, i] for k in range(len(down))) for i, w in enumerate(line)]
            total = sum(w * value for w, value in zip(changed, row, strict=True))
            if magnitude is not None:
                length = sum(w.detach() ** 2 for w in changed) ** 0.5
                total = total * magnitude[o] / length
            outputs.append(total if bias is None else total + bias[o])
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def multilora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, downs: Tensor, ups: Tensor, scales: Tensor, scaling: float
) -> Tensor:
    """h = W x + s Σₙ diag(cₙ) Bₙ Aₙ x (arXiv 2311.11501, equation 5), for x (M, I); (M, O)."""
    rows = []
    for row in x:
        total = torch.stack([sum(w * v for w, v in zip(line, row, strict=True)) for line in weight])
        if bias is not None:
            total = total + bias
        for down, up, scale in zip(downs, ups, scales, strict=True):
            inner = [sum(a * v for a, v in zip(line, row, strict=True)) for line in down]
            outer = [sum(b * v for b, v in zip(line, inner, strict=True)) for line in up]
            total = total + scaling * torch.stack([c * value for c, value in zip(scale, outer, strict=True)])
        rows.append(total)
    return torch.stack(rows)


def moelora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    downs: Tensor,
    ups: Tensor,
    embedding: Tensor,
    gate: Tensor,
    ids: list[int],
    scaling: float,
) -> Tensor:
    """h = W x + s Σₑ softmax(G e_t)ₑ Bₑ Aₑ x (arXiv 2310.18339, equations 5-8), for x (M, I), one id a row."""
    rows = []
    for row, task in zip(x, ids, strict=True):
        logits = torch.stack([sum(g * e for g, e in zip(line, embedding[task], strict=True)) for line in gate])
        total = torch.stack([sum(w * v for w, v in zip(line, row, strict=True)) for line in weight])
        if bias is not None:
            total = total + bias
        for share, down, up in zip(_softmax(logits, 1.0), downs, ups, strict=True):
            inner = [sum(a * v for a, v in zip(line, row, strict=True)) for line in down]
            outer = [sum(b * v for b, v in zip(line, inner, strict=True)) for line in up]
            total = total + scaling * share * torch.stack(outer)
        rows.append(total)
    return torch.stack(rows)
