"""Layers of every layout train, come back from their folder as they were, and export to PEFT without a difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.contracts import Sample, TaskSpec
from pipeline.evaluation.parity import export_parity
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base, load_tokenizer
from pipeline.modeling.encoding import Encoder
from pipeline.modeling.predictor import Predictor, PredictorSpec
from pipeline.modeling.scoring import LabelScorer, Scorer, label_loss
from tests.pipeline.modeling.test_architectures import EXTRA
from tests.pipeline.modeling.tiny import tiny_folder

TASKS = (
    TaskSpec(name="first", template="Text: {text}\nAnswer:", label_words=(" no", " yes")),
    TaskSpec(name="second", template="{text}\nSo:", label_words=(" may", " no", " yes"), kind="multiclass"),
)
SAMPLES = [
    Sample(key=f"{task.name}{i}", task=task.name, fields={"text": text}, label=i % 2)
    for task in TASKS
    for i, text in enumerate(("red sofa", "a longer text about cars", "x"))
]
LAYOUTS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "Conv1D, fused qkv, tied head": ("gpt2", ("c_attn", "c_proj"), {}),
    "fused qkv, biases, untied head": ("gpt_neox", ("query_key_value", "dense"), {"tie_word_embeddings": False}),
    "fused qkv in a subclass of Linear": ("falcon", ("query_key_value", "dense"), {}),
    "fused qkv and gates": ("phi3", ("qkv_proj", "o_proj", "gate_up_proj"), {}),
    "grouped queries, untied head": ("llama", ("q_proj", "v_proj"), {"tie_word_embeddings": False}),
    "grouped queries, tied head": ("qwen2", ("q_proj", "k_proj", "v_proj", "o_proj"), {"tie_word_embeddings": True}),
    "experts": ("mixtral", ("q_proj", "v_proj"), {}),
    "experts and shared ones": ("qwen2_moe", ("q_proj", "down_proj"), {}),
    "latent attention": ("deepseek_v3", ("q_a_proj", "kv_b_proj", "o_proj"), EXTRA["deepseek_v3"]),
    "windows": ("mistral", ("q_proj", "v_proj"), EXTRA["mistral"]),
    "windows in some layers": ("gemma3_text", ("q_proj", "v_proj"), EXTRA["gemma3_text"]),
    "a text model inside": ("gemma3", ("q_proj", "v_proj"), EXTRA["gemma3"]),
    "soft caps": ("gemma2", ("q_proj", "o_proj"), {}),
    "a head of several layers": ("modernbert-decoder", ("q_proj", "v_proj"), EXTRA["modernbert-decoder"]),
    "state space": ("mamba", ("in_proj", "x_proj"), {}),
    "state space and attention": ("jamba", ("q_proj", "in_proj"), EXTRA["jamba"]),
}
FAST = ("Conv1D, fused qkv, tied head", "latent attention", "experts")


@pytest.mark.parametrize("layout", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in LAYOUTS])
def test_a_trained_adapter_is_served_and_exported_as_it_was_trained(tmp_path: Path, layout: str) -> None:
    kind, targets, extra = LAYOUTS[layout]
    config = BaseModelConfig(base=str(tiny_folder(tmp_path / kind, kind, **extra)), max_length=64, dtype="float32")
    adapted: Any = build_adapter(AdapterConfig(target_modules=targets, r=4), load_base(config), [t.name for t in TASKS])
    encoder, scorer = Encoder(load_tokenizer(config), TASKS, config.max_length), LabelScorer(adapted)
    batch = encoder.collate(encoder.encode(SAMPLES))
    with torch.no_grad():
        untrained = scorer.eval()(batch)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    torch.manual_seed(0)
    for _ in range(5):
        optimizer.zero_grad()
        label_loss(scorer.train()(batch), batch).sum().backward()
        optimizer.step()
    with torch.no_grad():
        trained = scorer.eval()(batch)
    assert label_loss(trained, batch).sum() < label_loss(untrained, batch).sum()
    served = Scorer(scorer, encoder).probabilities(SAMPLES)

    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    PredictorSpec(tasks=TASKS, base=config).write(adapter / "predictor.json")
    reloaded = Predictor.load(adapter, "cpu").scorer.probabilities(SAMPLES)
    for one, other in zip(served, reloaded, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    exports = {task.name: adapted.export_task(task.name, tmp_path / task.name) for task in TASKS}
    assert max(export_parity(adapter, exports, SAMPLES).values()) < 2e-4
