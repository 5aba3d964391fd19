"""Every architecture that is loaded scores as its own logits do, or is refused with the reason: a matrix of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.modeling import packed_attention
from pipeline.modeling.base_model import BaseModelConfig, load_base, load_tokenizer
from pipeline.modeling.encoding import Encoder
from pipeline.modeling.scoring import LabelScorer, Scorer
from tests.pipeline.modeling.tiny import tiny_folder
from tests.reference.label_scores_reference import label_probabilities

TASKS = (TaskSpec(name="a", template="Text: {text}\nAnswer:", label_words=(" no", " yes", " may"), kind="multiclass"),)
TEXTS = ("red sofa", "a longer text about cars", "red sofa sale", "x")
SAMPLES = [Sample(key=str(i), task="a", fields={"text": text}, label=0) for i, text in enumerate(TEXTS)]
MLA = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
EXPERTS_AFTER_ONE = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
TEXT = {
    "vocab_size": 265,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 28,
    "patch_size": 14,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
EXTRA: dict[str, dict[str, Any]] = {
    "deepseek_v2": MLA | EXPERTS_AFTER_ONE,
    "deepseek_v3": MLA | EXPERTS_AFTER_ONE,
    "deepseek_v32": MLA | EXPERTS_AFTER_ONE | {"index_topk": 64, "index_n_heads": 2, "index_head_dim": 16},
    "minicpm3": MLA,
    "youtu": MLA,
    "glm4_moe_lite": MLA | EXPERTS_AFTER_ONE,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
    },
    "qwen3_next": LINEAR,
    "qwen3_5_text": LINEAR,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mistral": {"sliding_window": 16},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "modernbert-decoder": {"local_attention": 16},
    "xlstm": {"qk_dim_factor": 0.5, "v_dim_factor": 1.0},
}
PACKED = [
    "afmoe", "apertus", "arcee", "aria_text", "bitnet", "cohere", "cohere2", "ctrl",
    "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe",
    "flex_olmo", "gemma", "gemma3", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2",
    "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hyperclovax", "jetmoe", "llama", "llama4_text", "minicpm3", "minimax_m2", "ministral", "mixtral",
    "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi",
    "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
    "starcoder2", "youtu",
]  # fmt: skip
PADDED = [
    "bamba", "bart", "biogpt", "blenderbot", "bloom", "codegen", "deepseek_v32", "doge",
    "falcon", "falcon_h1", "falcon_mamba", "gemma2", "gemma3_text", "gpt_neo", "gpt_oss", "gptj",
    "granitemoehybrid", "jamba", "lfm2", "mamba", "mamba2", "marian", "mimo_v2_flash", "minimax",
    "mistral", "modernbert-decoder", "mpt", "nemotron", "nemotron_h", "openai-gpt", "pegasus", "qwen3_5_text",
    "qwen3_next", "recurrent_gemma", "rwkv", "stablelm", "vaultgemma", "xglm",
]  # fmt: skip
REFUSED = {
    "cpmant": "must be a causal language model.*later tokens change",
    "xlnet": "must be a causal language model.*later tokens change",
}
FAST = [
    "bloom", "xlnet", "deepseek_v3", "gemma2", "gpt2", "gpt_oss", "jamba", "llama4_text", "mistral",
    "modernbert-decoder", "opt", "qwen2",
]  # fmt: skip


def _matrix() -> list[Any]:
    kinds = [*((kind, "packed") for kind in PACKED), *((kind, "padded") for kind in PADDED), *REFUSED.items()]
    return [pytest.param(*row, id=row[0], marks=[] if row[0] in FAST else [pytest.mark.slow]) for row in sorted(kinds)]


@pytest.mark.parametrize(("kind", "outcome"), _matrix())
def test_scores_are_the_models_own_or_it_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, outcome: str
) -> None:
    config = BaseModelConfig(base=str(tiny_folder(tmp_path / kind, kind, **EXTRA.get(kind, {}))), max_length=64)
    config = config.model_copy(update={"dtype": "float32"})
    if kind in REFUSED:
        with pytest.raises(InputError, match=outcome):
            load_base(config)
        return
    base: Any = load_base(config)
    said = " ".join(capfd.readouterr().err.split())
    assert packed_attention.is_packed(base) is (outcome == "packed")
    assert (": rows are padded, " in said) is (outcome == "padded")
    encoder = Encoder(load_tokenizer(config), TASKS, config.max_length)
    found = Scorer(LabelScorer(base), encoder).probabilities(SAMPLES)
    plain = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32, attn_implementation="eager").eval()
    for example, probabilities in zip(encoder.encode(SAMPLES), found, strict=True):
        expected = label_probabilities(plain, list(example.prompt), [list(word) for word in example.words])
        np.testing.assert_allclose(probabilities, expected, atol=2e-4)


def test_at_least_45_architectures_are_tried() -> None:
    assert len({*PACKED, *PADDED, *REFUSED}) == len([*PACKED, *PADDED, *REFUSED]) >= 45
