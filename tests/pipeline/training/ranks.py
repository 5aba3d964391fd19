"""Base models small enough to start many processes on."""

from __future__ import annotations

from pathlib import Path


def tiny_base(folder: Path, width: int = 32) -> Path:
    """Save a random two-layer Llama with the embedded base's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.modeling.base_model import BaseModelConfig, load_tokenizer

    tokenizer = load_tokenizer(BaseModelConfig())
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_encoder(folder: Path) -> Path:
    """Save a random two-layer BERT with the embedded encoder's tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    from pipeline.modeling.base_model import BaseModelConfig, load_tokenizer

    tokenizer = load_tokenizer(BaseModelConfig(base="minilm-l6"))
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    BertModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
