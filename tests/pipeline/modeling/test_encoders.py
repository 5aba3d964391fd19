"""Encoders score by a head a task as a slow reference says, packed or padded, on every architecture: a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModel

from mtl_lora import AdapterModel
from mtl_lora.tasks import freeze_shared
from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.modeling import packed_attention
from pipeline.modeling.adapter import AdapterConfig, build_adapter, warm_adapter
from pipeline.modeling.answering import class_scorer, classes_of_heads, sample_encoder
from pipeline.modeling.base_model import BaseModelConfig, load_base, load_tokenizer
from pipeline.modeling.encoding import Encoder
from pipeline.modeling.packing import HeadExample, pack
from pipeline.modeling.predictor import Predictor, PredictorSpec
from pipeline.modeling.scoring import LabelScorer, Scorer, label_loss
from tests.pipeline.modeling.tiny import tiny_encoder_folder, tiny_tokenizer
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


def _adapted_for(config: BaseModelConfig, tasks: Sequence[TaskSpec]) -> AdapterModel:
    return _adapted(load_base(config), tasks=tasks)


def _adapted(base: Any, method: str = "mtl_lora", tasks: Sequence[TaskSpec] = TASKS) -> AdapterModel:
    torch.manual_seed(1)
    config = AdapterConfig(method=method, r=3 if method == "moelora" else 2, lora_dropout=0)
    adapted = build_adapter(config, base, [task.name for task in tasks], classes_of_heads(base, tasks))
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


def test_a_saved_adapter_brings_its_heads_and_a_damaged_file_is_told(tmp_path: Path) -> None:
    config = _config(tmp_path, "bert")
    adapted = _adapted(load_base(config))
    adapted.save_pretrained(tmp_path / "adapter")
    PredictorSpec(tasks=TASKS, base=config).write(tmp_path / "adapter" / "predictor.json")
    predictor = Predictor.load(tmp_path / "adapter")
    expected = Scorer(class_scorer(adapted), sample_encoder(config, TASKS)).probabilities(SAMPLES)
    for one, other in zip(predictor.scorer.probabilities(SAMPLES), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert predictor.predict(pd.DataFrame([{"task": "topic", "a": "x"}]))["label_word"][0] in TASKS[1].labels
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match="adapter folder"):
        Predictor.load(tmp_path / "adapter")


def test_tasks_come_and_go_and_the_others_heads_stay_bit_identical(tmp_path: Path) -> None:
    config = _config(tmp_path, "bert")
    adapted = _adapted(load_base(config))
    adapted.save_pretrained(tmp_path / "adapter")
    new = TaskSpec(name="new", kind="multiclass", template="{a}", labels=("p", "q", "r", "s"))
    tasks = (TASKS[0], TASKS[2], TASKS[3], new)
    base = load_base(config)
    found = warm_adapter(
        AdapterConfig(r=2, lora_dropout=0),
        base,
        tmp_path / "adapter",
        [t.name for t in tasks],
        classes_of_heads(base, tasks),
    )
    heads, before = found.task_heads, adapted.task_heads
    assert heads is not None
    assert before is not None
    assert heads.classes == (2, 1, 3, 4)
    for task, old in enumerate((0, 2, 3)):
        assert torch.equal(heads.weight[heads.rows(task)], before.weight[before.rows(old)])
        assert torch.equal(heads.bias[heads.rows(task)], before.bias[before.rows(old)])
    kept = [sample for sample in SAMPLES if sample.task != "topic"]
    expected = Scorer(class_scorer(adapted), sample_encoder(config, TASKS)).probabilities(kept)
    for one, other in zip(
        Scorer(class_scorer(found), sample_encoder(config, tasks)).probabilities(kept), expected, strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    changed = (TASKS[0].model_copy(update={"kind": "multiclass", "label_words": (" a", " b", " c")}), *TASKS[1:])
    base = load_base(config)
    with pytest.raises(InputError, match=r"head must have the rows.*keep the tasks' classes"):
        warm_adapter(
            AdapterConfig(r=2, lora_dropout=0), base, tmp_path / "adapter", NAMES, classes_of_heads(base, changed)
        )


def test_an_absent_tasks_head_gets_zero_gradient_and_only_the_chosen_ones_train(tmp_path: Path) -> None:
    config = _config(tmp_path, "bert")
    adapted = _adapted(load_base(config))
    batch = pack(sample_encoder(config, TASKS).encode(SAMPLES[:2]))
    heads = adapted.task_heads
    assert heads is not None
    label_loss(class_scorer(adapted)(batch), batch).sum().backward()
    assert heads.weight.grad is not None
    assert [bool(heads.weight.grad[heads.rows(t)].any()) for t in range(4)] == [True, True, False, False]
    adapted.zero_grad()
    freeze_shared(adapted, "topic")
    label_loss(class_scorer(adapted)(batch), batch).sum().backward()
    assert [bool(heads.weight.grad[heads.rows(t)].any()) for t in range(4)] == [False, True, False, False]


def test_a_task_with_labels_alone_is_refused_for_a_language_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'topic': a language model answers by label words after a template"):
        Encoder(tiny_tokenizer(), [TASKS[1]], 64)


def test_a_classes_weight_multiplies_the_samples_own(tmp_path: Path) -> None:
    pair = TASKS[0].model_copy(update={"class_weights": {"1": 3.0}})
    samples = [SAMPLES[0].model_copy(update={"weight": 0.5}), SAMPLES[4], SAMPLES[0]]
    words = Encoder(load_tokenizer(BaseModelConfig()), (pair,), 64)
    for encoder in (sample_encoder(_config(tmp_path, "bert"), (pair,)), words):
        assert [example.weight for example in encoder.encode(samples)] == [1.5, 1.0, 3.0]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_has_no_words_to_score(tmp_path: Path, kind: str) -> None:
    base = load_base(BaseModelConfig(base=str(tiny_encoder_folder(tmp_path / kind, kind)), max_length=64))
    with pytest.raises(InputError, match=r"label words are scored by a language model, got .*; an encoder answers by"):
        LabelScorer(base)
