"""Encoders score by a head a task as a slow reference says, packed or padded, on every architecture: a matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from mtl_lora import AdapterModel
from pipeline.contracts import Sample, TaskSpec
from pipeline.modeling import packed_attention
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.answering import class_scorer, classes_of_heads, sample_encoder
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.packing import HeadExample, pack
from pipeline.modeling.scoring import label_loss
from tests.pipeline.modeling.tiny import tiny_encoder_folder
from tests.reference.encoder_reference import class_log_probabilities

TASKS = (
    TaskSpec(name="pair", template="Query: {a}\nAd: {b}\nRelevant:", label_words=(" no", " yes")),
    TaskSpec(name="topic", kind="multiclass", segments=("Topic of {a}",), labels=("cars", "sofas", "music")),
    TaskSpec(name="pick", kind="choice", template="{a}?"),
    TaskSpec(
        name="grade", kind="ordinal", template="{a} or {b}", label_words=(" 0", " 1", " 2"), label_values=(0, 1, 2)
    ),
)
TEXTS = {"a": "red sofa", "b": "a much longer text about a sofa that is red"}
SAMPLES = [
    Sample(key="1", task="pair", fields=TEXTS, label=1),
    Sample(key="2", task="topic", fields={"a": "x"}, label=2),
    Sample(key="3", task="pick", fields={"a": "which"}, label=1, choices=("this", "that one", "or none of them all")),
    Sample(key="4", task="grade", fields={"a": "y", "b": "z"}, label=1.5),
    Sample(key="5", task="pair", fields={"a": "one", "b": "other"}, label=0),
]
NAMES = [task.name for task in TASKS]
ALIKE = {"local_attention": 16, "global_attn_every_n_layers": 2}
EXTRA: dict[str, dict[str, Any]] = {
    "modernbert": ALIKE,
    "big_bird": {"attention_type": "original_full"},
    "nystromformer": {"conv_kernel_size": None},
    "esm": {"position_embedding_type": "rotary", "mask_token_id": 4},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 32},
}
PACKED = [
    "albert", "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "eurobert", "modernbert",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
]  # fmt: skip
PADDED = ["big_bird", "deberta", "deberta-v2", "esm", "megatron-bert", "mpnet", "rembert", "roformer"]
FAST = ["bert", "deberta-v2", "modernbert", "roberta"]


def _matrix() -> list[Any]:
    rows = [*((kind, True) for kind in PACKED), *((kind, False) for kind in PADDED)]
    return [pytest.param(*row, id=row[0], marks=[] if row[0] in FAST else [pytest.mark.slow]) for row in sorted(rows)]


def _config(folder: Path, kind: str, **changes: Any) -> BaseModelConfig:
    base = str(tiny_encoder_folder(folder / kind, kind, **EXTRA.get(kind, {})))
    return BaseModelConfig(base=base, max_length=64, dtype="float32", **changes)


def _adapted(base: Any, method: str = "mtl_lora") -> AdapterModel:
    torch.manual_seed(1)
    config = AdapterConfig(method=method, r=2, lora_dropout=0)
    adapted = build_adapter(config, base, NAMES, classes_of_heads(base, TASKS))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapted


def _reference(plain: Any, config: BaseModelConfig, example: HeadExample, heads: Any) -> torch.Tensor:
    has_segments = (getattr(plain.config, "type_vocab_size", 0) or 0) > 1
    rows = list(example.head_rows)
    return class_log_probabilities(
        plain,
        example.rows,
        example.token_types if has_segments else None,
        heads.weight[rows],
        heads.bias[rows],
        config.pooling,
    )


@pytest.mark.parametrize(("kind", "is_packed"), _matrix())
def test_scores_and_gradients_are_those_of_the_reference(tmp_path: Path, kind: str, is_packed: bool) -> None:
    config = _config(tmp_path, kind)
    base: Any = load_base(config)
    assert (base.config._attn_implementation == packed_attention.NAME) is is_packed
    adapted = _adapted(base)
    examples = sample_encoder(config, TASKS).encode(SAMPLES)
    batch = pack(examples)
    found_EC = class_scorer(adapted)(batch)
    label_loss(found_EC, batch).sum().backward()
    loss = torch.zeros(())
    twin = _adapted(_plain(config))
    for example, found_C in zip(examples, found_EC, strict=True):
        with twin.router.route(torch.tensor(example.task)):
            expected_C = _reference(twin.base_model, config, example, twin.task_heads)
        torch.testing.assert_close(found_C[: len(expected_C)], expected_C, atol=2e-4, rtol=1e-4)
        loss = loss - (torch.tensor(example.target) * expected_C).sum()
    loss.backward()
    for (name, one), other in zip(adapted.named_parameters(), twin.parameters(), strict=True):
        if one.requires_grad:
            assert one.grad is not None, name
            torch.testing.assert_close(one.grad, other.grad, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def _plain(config: BaseModelConfig) -> Any:
    model = AutoModel.from_pretrained(config.base, dtype=torch.float32, attn_implementation="eager").eval()
    if getattr(model, "pooler", None) is not None:
        model.pooler = torch.nn.Identity()
    return model


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_mean_pooling_is_that_of_the_reference(tmp_path: Path, kind: str) -> None:
    config = _config(tmp_path, kind, pooling="mean")
    adapted = _adapted(load_base(config))
    examples = sample_encoder(config, TASKS).encode(SAMPLES)
    twin = _adapted(_plain(config))
    for example, found_C in zip(examples, class_scorer(adapted)(pack(examples)), strict=True):
        with twin.router.route(torch.tensor(example.task)):
            expected_C = _reference(twin.base_model, config, example, twin.task_heads)
        torch.testing.assert_close(found_C[: len(expected_C)], expected_C, atol=2e-4, rtol=1e-4)


def test_pairs_stand_in_the_tokenizers_own_two_segments(tmp_path: Path) -> None:
    config = BaseModelConfig(base="minilm-l6", dtype="float32")
    pair, topic, pick, *_ = sample_encoder(config, TASKS).encode(SAMPLES)
    tokenizer = sample_encoder(config, TASKS).tokenizer
    assert tokenizer.decode(pair.rows[0]) == f"[CLS] {TEXTS['a']} [SEP] {TEXTS['b']} [SEP]"
    assert pair.token_types[0] == (0,) * 4 + (1,) * 11
    assert tokenizer.decode(topic.rows[0]) == "[CLS] topic of x [SEP]"
    assert [tokenizer.decode(row) for row in pick.rows] == [f"[CLS] which [SEP] {c} [SEP]" for c in SAMPLES[2].choices]


def test_a_long_pair_loses_the_end_of_its_longer_text(tmp_path: Path) -> None:
    config = BaseModelConfig(base="minilm-l6", dtype="float32", max_length=16)
    encoder = sample_encoder(config, TASKS)
    [example] = encoder.encode([Sample(key="1", task="pair", fields={"a": "red", "b": "sofa " * 50}, label=1)])
    assert len(example.rows[0]) == 16
    assert encoder.tokenizer.decode(example.rows[0]).startswith("[CLS] red [SEP] sofa")
