"""Random models of any architecture, small enough to be built, saved and asked in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "n_inner", "inner_dim"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "d_kv": 8,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, with merges for the words of these tests."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "n"), ("Ġn", "o"), ("Ġ", "y"), ("Ġy", "e"), ("Ġye", "s")]
    tokens = [*SPECIAL, *letters, *("".join(merge) for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    )


def tiny_settings(kind: str, **extra: Any) -> Any:
    """Return the small configuration of a Hugging Face model type."""
    known = AutoConfig.for_model(kind).to_dict()
    small = {key: value for key, value in SMALL.items() if key in known}
    if "layer_types" in known:
        small["layer_types"] = None
    return AutoConfig.for_model(kind, **{**small, "vocab_size": len(tiny_tokenizer()), **extra})


def tiny_model(kind: str, **extra: Any) -> Any:
    """Return a random model whose layers and biases all count."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_settings(kind, **extra)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
    return model


def tiny_folder(folder: Path, kind: str, **extra: Any) -> Path:
    """Save such a model with its tokenizer and return the folder."""
    tiny_model(kind, **extra).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_encoder_folder(folder: Path, kind: str, **extra: Any) -> Path:
    """Save a random encoder, whose states differ by token, place and segment, with its tokenizer; return the folder."""
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_settings(kind, **extra)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
