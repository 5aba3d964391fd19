"""A look inside a trained adapter, as plain functions: which task uses what, and which tasks pull apart.

Axes as in :mod:`mtl_lora.functional`.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mtl_lora.core import AdapterCore
from mtl_lora.errors import MTLLoRAError
from mtl_lora.functional import mixing_weights as mixing_weights_of
from mtl_lora.layer import MTLLoRALinear

__all__ = [
    "effective_rank",
    "effective_ranks",
    "gradient_cosine",
    "mixing_weights",
    "task_similarity",
    "transform_distance",
    "up_projection_overlap",
]


def _mtl_layers(model: AdapterCore) -> dict[str, MTLLoRALinear]:
    layers = {path: layer for path, layer in model.adapted_layers().items() if isinstance(layer, MTLLoRALinear)}
    if not layers:
        raise MTLLoRAError(f"mixing weights and transforms belong to method 'mtl_lora', got {model.method!r}")
    return layers


@torch.no_grad()
def mixing_weights(model: AdapterCore) -> dict[str, Tensor]:
    """Return each layer's softmax(w / τ) by path, (T, N): a row says which up-projections serve a task."""
    return {path: mixing_weights_of(m.mixing_logits(), m.temperature) for path, m in _mtl_layers(model).items()}


@torch.no_grad()
def transform_distance(model: AdapterCore) -> dict[str, Tensor]:
    """Return ‖Λ_t - I‖_F / √R for each layer and task by path, (T,): 0 at the start, 1 where Λ_t is zero."""
    distances = {}
    for path, layer in _mtl_layers(model).items():
        transform = layer.lora_transform.to(torch.promote_types(layer.lora_transform.dtype, torch.float32))
        neutral = torch.eye(layer.r, dtype=transform.dtype, device=transform.device) if layer.is_full else 1.0
        distances[path] = (transform - neutral).flatten(1).norm(dim=1) / layer.r**0.5
    return distances


def up_projection_overlap(model: AdapterCore) -> Tensor:
    """Return the mean over layers of Σ_{i<j} ‖Bᵢᵀ Bⱼ‖²_F, differentiable: 0 where up-projections are orthogonal."""
    overlaps = []
    for layer in _mtl_layers(model).values():
        up_NOR = layer.lora_B.to(torch.promote_types(layer.lora_B.dtype, torch.float32))
        wide = up_NOR.transpose(1, 2).flatten(0, 1)  # (N·R, O)
        squares_NN = (wide @ wide.t()).square().unflatten(0, (-1, layer.r)).unflatten(2, (-1, layer.r)).sum((1, 3))
        overlaps.append(squares_NN.triu(1).sum())
    return torch.stack(overlaps).mean()


def effective_rank(down_RI: Tensor, up_OR: Tensor) -> float:
    """Return the effective rank of ``up @ down``: exp of the entropy of its normalised singular values.

    Between 1 and R (Roy and Vetterli 2007); 0 for a zero matrix. Two QR factors spare the (O, I) product.
    """
    dtype = torch.promote_types(down_RI.dtype, torch.float32)
    inner = torch.linalg.qr(up_OR.to(dtype), mode="r")[1] @ torch.linalg.qr(down_RI.to(dtype).t(), mode="r")[1].t()
    values = torch.linalg.svdvals(inner)
    total = float(values.sum())
    if total == 0:
        return 0.0
    shares = values / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


@torch.no_grad()
def effective_ranks(model: AdapterCore) -> dict[str, list[float]]:
    """Return each layer's effective rank a task, by path."""
    tasks = range(len(model.task_names))
    return {path: [effective_rank(*m.factors(t)) for t in tasks] for path, m in model.adapted_layers().items()}


@torch.no_grad()
def task_similarity(model: AdapterCore) -> Tensor:
    """Return the cosine between the tasks' weight changes over all layers, (T, T); 0 where a change is zero.

    ⟨U_s A, U_t A⟩ = tr(U_sᵀ U_t A Aᵀ) needs only rank-sized products.
    """
    num_tasks = len(model.task_names)
    gram = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
    for layer in model.adapted_layers().values():
        factors = [tuple(f.to("cpu", torch.float64) for f in layer.factors(task)) for task in range(num_tasks)]
        for s, (down_s, up_s) in enumerate(factors):
            for t, (down_t, up_t) in enumerate(factors):
                gram[s, t] += ((up_s.t() @ up_t) * (down_s @ down_t.t())).sum()
    return _cosine_of(gram)


def _cosine_of(gram: Tensor) -> Tensor:
    """Return the cosines that belong to a matrix of inner products; 0 for vectors of length 0."""
    length = gram.diagonal().clamp_min(0).sqrt()
    scale = length.unsqueeze(0) * length.unsqueeze(1)
    return torch.where(scale > 0, gram / scale.clamp_min(torch.finfo(gram.dtype).tiny), torch.zeros_like(gram))


def gradient_cosine(
    model: AdapterCore, losses: Mapping[str, Callable[[], Tensor | Iterator[Tensor]]], shared_only: bool = True
) -> tuple[list[str], Tensor]:
    """Return the tasks' names and the cosine between their gradients, (T, T); negative entries are conflict.

    Args:
        model: any adapted model; its ``.grad`` fields are left alone.
        losses: for each task a function that runs the model on that task's data and returns its loss, a scalar, or an
            iterator over parts that add up to it, of which one at a time is held.
        shared_only: compare only what tasks share (A and B); a task's own rows cannot conflict.

    Raises:
        MTLLoRAError: nothing trainable is left to compare, or no loss is given.
    """
    own = {id(getattr(part, name)) for part in model.task_modules() for name in part.task_parameter_names}
    parameters = [p for p in model.parameters() if p.requires_grad and not (shared_only and id(p) in own)]
    if not parameters or not losses:
        raise MTLLoRAError(f"gradients need trainable parameters and losses, got {len(parameters)} and {len(losses)}")
    gradients = []
    for loss in losses.values():
        found = loss()
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for part in [found] if isinstance(found, Tensor) else found:
            pairs = zip(torch.autograd.grad(part, parameters, allow_unused=True), parameters, strict=True)
            flat = [(torch.zeros_like(p) if g is None else g).flatten().to("cpu", torch.float64) for g, p in pairs]
            total += torch.cat(flat)
        gradients.append(total)
    stacked = torch.stack(gradients)
    return list(losses), _cosine_of(stacked @ stacked.t())
