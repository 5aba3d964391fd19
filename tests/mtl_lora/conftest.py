"""Small models that the tests of this folder share."""

import copy

import pytest
import torch
from torch import nn

from mtl_lora import MTLLoRAConfig, MTLLoRAModel


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tiny tensors gain nothing from threads, and on a busy machine threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    """Two linear layers with a residual, so that a wrong route shows in the output."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.second(torch.tanh(self.norm(self.first(x))))


class Stack(nn.Module):
    """Blocks, optionally each under activation checkpointing."""

    def __init__(self, width: int = 6, depth: int = 2, checkpointing: str | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)
        self.checkpointing = checkpointing

    def forward(self, x):
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        return self.head(x)


def randomise(model: MTLLoRAModel, seed: int = 0) -> MTLLoRAModel:
    """Give all adapter parameters values that make tasks differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.adapted_layers().values():
            for parameter in layer.adapter_parameters().values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
                parameter.add_(noise.to(parameter.dtype))
    return model


def make_model(base=None, tasks=("a", "b", "c"), targets=("first", "second"), dtype=torch.float64, **options):
    torch.manual_seed(0)
    base = Stack().to(dtype) if base is None else base
    config = MTLLoRAConfig(
        task_names=tasks, target_modules=targets, **{"r": 2, "lora_dropout": 0.0, "temperature": 0.7, **options}
    )
    return randomise(MTLLoRAModel(base, config))


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def clone(module):
    return copy.deepcopy(module)
