"""The implementations that the benchmarks compare with: PEFT LoRA, and the paper's three batched products."""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_lora import MTLLoRAConfig
from mtl_lora.layer import MTLLoRALinear
from mtl_lora.routing import Router

TASKS = 8
RANK = 8
UPS = 3
ALPHA = 16
TASK_NAMES = [f"task{i}" for i in range(TASKS)]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class PaperLinear(nn.Module):
    """A plain transcription of the authors' forward (pUmpKin-Co/MTL-LoRA 7848a70, src/adapter/mlora.py)."""

    def __init__(self, base: nn.Linear, holder: Any, dropout: float) -> None:
        super().__init__()
        size_in, size_out = base.in_features, base.out_features
        self.weight, self.bias, self.holder = base.weight, base.bias, holder
        self.lora_A = nn.Parameter(torch.empty(1, RANK, size_in))
        self.lora_B = nn.Parameter(torch.randn(UPS, size_out, RANK) * 0.02)
        self.lora_lambdas = nn.Parameter(torch.eye(RANK).repeat(TASKS, 1, 1))
        self.lora_B_w = nn.Parameter(torch.empty(TASKS, UPS))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.lora_B_w, a=math.sqrt(5))
        self.lora_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        ids = self.holder.ids
        down = torch.index_select(self.lora_A, 0, torch.zeros_like(ids))
        transform = torch.index_select(self.lora_lambdas, 0, ids)
        weights = F.softmax(self.lora_B_w / 0.1, dim=-1, dtype=torch.float32).to(self.lora_B.dtype)
        mixed = (weights @ self.lora_B.view(UPS, -1)).reshape(-1, *self.lora_B.shape[1:])
        up = torch.index_select(mixed, 0, ids)
        result = F.linear(x, self.weight, self.bias)
        inner = torch.bmm(self.lora_dropout(x), down.transpose(-2, -1))
        inner = torch.bmm(inner, transform.transpose(-2, -1))
        result += torch.bmm(inner, up.transpose(-2, -1)) * (ALPHA / RANK)
        return result


def mtl_config(dropout: float, **options: Any) -> MTLLoRAConfig:
    """Return the configuration that all benchmarks use: r = 8, n = 3, 8 tasks."""
    return MTLLoRAConfig(TASK_NAMES, r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, **options)


def layers(width: int, dropout: float, ids: Tensor) -> dict[str, nn.Module]:
    """Return one adapted linear layer of each kind, and the frozen layer alone."""
    from peft import LoraConfig, get_peft_model

    router = Router()
    router.ids = ids
    base = nn.Linear(width, width, bias=False).requires_grad_(False)
    peft = get_peft_model(
        nn.Sequential(nn.Linear(width, width, bias=False)),
        LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["0"]),
    )
    paper = PaperLinear(nn.Linear(width, width, bias=False).requires_grad_(False), router, dropout)
    ours = MTLLoRALinear(nn.Linear(width, width, bias=False).requires_grad_(False), mtl_config(dropout), router)
    nn.init.normal_(ours.lora_B, std=0.02)
    return {"base": base, "peft_lora": peft.base_model.model[0], "paper": paper, "mtl_lora": ours}


def smollm2_135m() -> nn.Module:
    """Return a frozen model of SmolLM2-135M's shape with random weights: its speed does not depend on their values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def copy_of(base: nn.Module) -> nn.Module:
    """Return new modules on the same frozen weights, so that candidates differ in nothing but their adapters."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def lora_config(dropout: float) -> Any:
    """Return PEFT's configuration of the same rank and targets."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=TARGETS)


def peft_model(base: nn.Module, dropout: float) -> nn.Module:
    """Put PEFT's LoRA on q, k, v, o."""
    from peft import get_peft_model

    return get_peft_model(base, lora_config(dropout))


def paper_model(base: nn.Module, holder: Any, dropout: float) -> nn.Module:
    """Put the paper's forward on q, k, v, o; ``holder.ids`` are the rows' tasks."""
    for path, module in list(base.named_modules()):
        if path.rsplit(".", 1)[-1] in TARGETS:
            parent, _, name = path.rpartition(".")
            setattr(base.get_submodule(parent), name, PaperLinear(module, holder, dropout))
    return base
