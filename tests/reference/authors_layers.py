"""The authors' adapted layers in plain torch: their formulas, shapes, order of operations and initial values.

Transcribed from pUmpKin-Co/MTL-LoRA 7848a70, ``src/adapter`` (mlora, moelora, multilora, lora, dora); dropout is left
out, and their way of adding to a result in place. Each takes x (B, S, I) and one task id a row.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _kaiming(*shape: int) -> nn.Parameter:
    """Uniform between ± 1/√(last axis), as each of their matrices starts on its own."""
    parameter = nn.Parameter(torch.empty(*shape))
    for matrix in parameter if len(shape) == 3 else [parameter]:
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    return parameter


class AuthorsLayer(nn.Module):
    """A frozen layer and a low-rank path scaled by alpha / r."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scaling = base.weight.detach(), base.bias.detach(), alpha / r

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.path(x, ids)

    def path(self, x: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError


class AuthorsMTLLoRA(AuthorsLayer):
    """``mLoRALinear``: one A for every row, the row's Λ, and its own mixture of the B; the softmax is in fp32."""

    def __init__(self, base, r, alpha, tasks, ups, temperature, diagonal):
        super().__init__(base, r, alpha)
        self.A = _kaiming(1, r, base.in_features)
        self.transform = nn.Parameter(torch.ones(tasks, r) if diagonal else torch.eye(r).repeat(tasks, 1, 1))
        self.B = nn.Parameter(torch.zeros(ups, base.out_features, r))
        self.mixing, self.temperature, self.diagonal = _kaiming(tasks, ups), temperature, diagonal

    def path(self, x, ids):
        transform = self.transform.index_select(0, ids)
        transform = torch.diag_embed(transform) if self.diagonal else transform
        shares = F.softmax(self.mixing / self.temperature, dim=-1, dtype=torch.float32).to(self.B.dtype)
        mixed = (shares @ self.B.flatten(1)).view(-1, *self.B.shape[1:]).index_select(0, ids)
        down = self.A.index_select(0, torch.zeros_like(ids))
        for matrix in (down, transform, mixed):
            x = torch.bmm(x, matrix.transpose(1, 2))
        return x * self.scaling


class AuthorsMoELoRA(AuthorsLayer):
    """``MMOELoraLinear``: experts of rank r / E, a gate over an embedding of the task, one row more than tasks."""

    def __init__(self, base, r, alpha, tasks, experts, features=64):
        super().__init__(base, r, alpha)
        self.embedding = nn.Embedding(tasks + 1, features)
        self.gate = nn.Linear(features, experts, bias=False)
        share = r // experts
        self.A = nn.ParameterList(torch.randn(share, base.in_features) * 0.01 for _ in range(experts))
        self.B = nn.ParameterList(torch.zeros(base.out_features, share) for _ in range(experts))

    def path(self, x, ids):
        shares = torch.softmax(self.gate(self.embedding(ids)), dim=1)
        experts = zip(self.A, self.B, shares.unbind(-1), strict=True)
        return sum(F.linear(F.linear(x, A), B) * self.scaling * share.view(-1, 1, 1) for A, B, share in experts)


class AuthorsMultiLoRA(AuthorsLayer):
    """``MultiLoRALinear``: parallel A and B, both Kaiming, and a scale an output feature, zero at first."""

    def __init__(self, base, r, alpha, parts):
        super().__init__(base, r, alpha)
        pairs = [(_kaiming(r, base.in_features), _kaiming(base.out_features, r)) for _ in range(parts)]
        self.A, self.B = (nn.Parameter(torch.stack(side).detach()) for side in zip(*pairs, strict=True))
        self.scales = nn.Parameter(torch.zeros(parts, base.out_features))

    def path(self, x, ids):
        inner = torch.einsum("bsd,nrd->nbsr", x, self.A)
        parts = zip(inner, self.B, self.scales, strict=True)
        return sum(each @ B.t() * scale * self.scaling for each, B, scale in parts)


class AuthorsLoRA(AuthorsLayer):
    """``LoRALinear``."""

    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        self.A, self.B = _kaiming(r, base.in_features), nn.Parameter(torch.zeros(base.out_features, r))

    def path(self, x, ids):
        return F.linear(F.linear(x, self.A), self.B) * self.scaling


class AuthorsDoRA(AuthorsLoRA):
    """``DoRALinear`` with ``dora_simple``: the length of a row of the new weight counts as a constant."""

    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        self.magnitude = nn.Parameter(torch.linalg.norm(self.weight, dim=1))

    def path(self, x, ids):
        length = torch.linalg.norm(self.weight + self.scaling * self.B @ self.A, dim=1).detach()
        scale = self.magnitude / length
        return (scale - 1) * F.linear(x, self.weight) + scale * super().path(x, ids)
