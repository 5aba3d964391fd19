"""Answers that are written in batches of mixed tasks against each task's own merged model, asked one row at a time."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.contracts import Sample, TaskSpec
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base, load_tokenizer
from pipeline.modeling.encoding import Encoder
from pipeline.modeling.packing import pack
from pipeline.modeling.scoring import LabelScorer, Scorer, UntrainedScorer, label_loss
from tests.pipeline.modeling.tiny import tiny_folder

KIND = {"kind": "generation", "template": "{text}\nAnswer:"}
TASKS = (
    TaskSpec(name="spam", template="{text}\nSpam:", label_words=(" no", " yes")),
    TaskSpec(name="short", **KIND, generation={"max_new_tokens": 5}),
    TaskSpec(name="long", **KIND, generation={"max_new_tokens": 12}),
    TaskSpec(name="again", **KIND, generation={"max_new_tokens": 12, "loss": "token"}),
    TaskSpec(name="beams", **KIND, generation={"max_new_tokens": 6, "num_beams": 3, "length_penalty": 0.5}),
    TaskSpec(
        name="asked",
        kind="choice",
        template="{text}\nAnswer:",
        answer_by="generation",
        generation={"max_new_tokens": 3},
    ),
)
TEXTS = ("the sky", "a very long walk through the fields behind the old house", "red")
WRITTEN = ("short", "long", "again", "beams")
SAMPLES = [
    Sample(
        key=f"{i}", task=name, fields={"text": text}, label=0, answers=("blue",) if name in WRITTEN else (),
        choices=("one", "two") if name == "asked" else (),
    )
    for i, text in enumerate(TEXTS)
    for name in (*WRITTEN, "spam", "asked")
]  # fmt: skip


def _adapted(base: Any) -> Any:
    torch.manual_seed(0)
    adapted = build_adapter(AdapterConfig(r=4, lora_dropout=0.0), base, [task.name for task in TASKS])
    with torch.no_grad():
        for layer in adapted.adapted_layers().values():
            layer.lora_B.normal_(0, 0.3)
            layer.lora_transform.normal_(0, 0.5)
    return adapted


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BaseModelConfig:
    folder = tiny_folder(tmp_path_factory.mktemp("bases") / "llama", "llama")
    return BaseModelConfig(base=str(folder), dtype="float32", max_length=96)


@pytest.fixture(scope="module")
def adapted(tiny: BaseModelConfig) -> Any:
    return _adapted(load_base(tiny))


@pytest.fixture(scope="module")
def scorer(adapted: Any, tiny: BaseModelConfig) -> Scorer:
    return Scorer(LabelScorer(adapted), Encoder(load_tokenizer(tiny), TASKS, 96), batch_tokens=512)


def _alone(model: Any, scorer: Scorer, sample: Sample, **ids: Any) -> str:
    """Ask a Hugging Face model one row, without padding or company."""
    encoder: Any = scorer.encoder
    settings = encoder.spec_of(sample).generation
    row = torch.tensor([encoder.prompts([sample])[0].ids])
    end = encoder.tokenizer.eos_token_id
    found = model.generate(
        input_ids=row, attention_mask=torch.ones_like(row), do_sample=False, eos_token_id=end, pad_token_id=end,
        max_new_tokens=settings.max_new_tokens, num_beams=settings.num_beams, length_penalty=settings.length_penalty,
        **ids,
    )  # fmt: skip
    return encoder.tokenizer.decode(found[0, row.shape[1] :], skip_special_tokens=True).strip()


def test_mixed_batches_write_what_each_tasks_merged_model_writes_alone(adapted: Any, scorer: Scorer) -> None:
    counts: list[int] = []
    texts = scorer.texts(SAMPLES, counts.append)
    assert sum(counts) == sum(text is not None for text in texts) == 15
    assert len(counts) < 15  # some went together
    for name in (*WRITTEN, "asked"):
        merged = copy.deepcopy(adapted).merge_and_unload(name)
        for sample, text in zip(SAMPLES, texts, strict=True):
            if sample.task == name:
                assert text == _alone(merged, scorer, sample)
    assert all(text is None for sample, text in zip(SAMPLES, texts, strict=True) if sample.task == "spam")
    assert len(set(texts)) > 5  # the tasks differ


def test_the_untrained_base_writes_by_itself_whatever_the_task(
    adapted: Any, scorer: Scorer, tiny: BaseModelConfig
) -> None:
    base = Scorer(UntrainedScorer(adapted), scorer.encoder)
    mine = [sample for sample in SAMPLES if sample.task in ("short", "beams")]
    plain: Any = load_base(tiny)
    assert base.texts(mine) == [_alone(plain, scorer, sample) for sample in mine]


def test_a_stop_ends_the_answer_and_is_no_part_of_it(scorer: Scorer) -> None:
    sample = next(sample for sample in SAMPLES if sample.task == "long")
    (whole,) = scorer.texts([sample])
    assert whole is not None
    stop = whole[len(whole) // 2 :][:3]
    spec = TASKS[2].model_copy(update={"generation": TASKS[2].generation.model_copy(update={"stop": (stop,)})})
    stopping = Scorer(scorer.model, Encoder(scorer.encoder.tokenizer, (*TASKS[:2], spec, *TASKS[3:]), 96))
    assert stopping.texts([sample]) == [whole[: whole.index(stop)].strip()]


def test_a_reply_is_scores_for_labels_a_text_for_free_answers_and_both_for_written_labels(scorer: Scorer) -> None:
    asked = [sample.model_copy(update={"answers": ()}) for sample in SAMPLES]
    replies = scorer.replies(asked)
    for sample, reply in zip(asked, replies, strict=True):
        if sample.task == "spam":
            assert reply.text is None and reply.probabilities.sum() == pytest.approx(1.0)
        elif sample.task == "asked":
            assert reply.text is not None and reply.probabilities.tolist() == [0.0, 0.0]  # no word of its choices
        else:
            assert reply.text is not None and len(reply.probabilities) == 0
    (reply,) = scorer.replies([asked[5].model_copy(update={"choices": ("never", f" {replies[5].text} ")})])
    assert reply.probabilities.tolist() == [0.0, 1.0]


def test_an_evaluated_answer_carries_the_likelihood_of_the_right_one(scorer: Scorer) -> None:
    found = scorer.evaluated(SAMPLES)
    batch = pack(list(scorer.encoder.encode(SAMPLES)))
    with torch.no_grad():
        losses = label_loss(scorer.model(batch), batch).tolist()
    for sample, (reply, state), loss in zip(SAMPLES, found, losses, strict=True):
        assert state.shape == (32,)
        if sample.task in WRITTEN:
            assert reply.probabilities == pytest.approx([np.exp(-loss)], rel=1e-4)
