"""Answers that are written: their tokens, and their loss against the language model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.modeling import packed_attention
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.answering import check_base
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.encoding import Encoder
from pipeline.modeling.packing import micro_batches, pack
from pipeline.modeling.scoring import LabelScorer, label_loss

COLOUR = TaskSpec(name="colour", kind="generation", template="{text}\nColour:", generation={"max_new_tokens": 6})
SPAM = TaskSpec(name="spam", template="{text}\nSpam:", label_words=(" no", " yes"))
WRITTEN_SPAM = SPAM.model_copy(update={"name": "asked", "answer_by": "generation"})
TASKS = (SPAM, COLOUR)


def _colour(key: str, text: str, *answers: str) -> Sample:
    return Sample(key=key, task="colour", fields={"text": text}, label=0, answers=answers)


SAMPLES = [
    _colour("a", "a red ball", "red"),
    Sample(key="b", task="spam", fields={"text": "a red ball"}, label=1),
    _colour("c", "a red ball", "dark red, almost black"),
    _colour("d", "the sky of a very long day", "light blue"),
]


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, TASKS, 48)


def test_the_tokens_of_an_answer_say_its_text_and_end_with_the_end_token(encoder: Encoder) -> None:
    example = encoder.encode(SAMPLES[3:])[0]
    (word,) = example.words
    assert word[-1] == encoder.tokenizer.eos_token_id
    assert encoder.tokenizer.decode(word[:-1]) == " light blue"
    assert encoder.tokenizer.decode(example.prompt) == "the sky of a very long day\nColour:"
    assert example.prompt == encoder.prompts(SAMPLES[3:])[0].ids


def test_an_answer_longer_than_may_be_written_loses_its_end(encoder: Encoder) -> None:
    (example,) = encoder.encode([_colour("x", "a ball", "one two three four five six seven")])
    assert len(example.words[0]) == 6
    assert encoder.tokenizer.eos_token_id not in example.words[0]


def test_a_prompt_leaves_room_for_the_longest_answer_whichever_it_has(encoder: Encoder) -> None:
    long = "word " * 100
    short, other = encoder.encode([_colour("x", long, "red"), _colour("y", long, "dark red of the sea")])
    assert short.prompt == other.prompt == encoder.prompts([_colour("x", long)])[0].ids
    assert len(short.prompt) == 48 - 6


def test_a_label_that_is_written_has_the_word_as_its_answer(tokenizer: Any) -> None:
    (example,) = Encoder(tokenizer, [WRITTEN_SPAM], 48).encode([SAMPLES[1].model_copy(update={"task": "asked"})])
    assert tokenizer.decode(example.words[0][:-1]) == " yes"
    assert example.is_written and example.target == (1.0,)


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_the_models_own_over_the_answers_tokens_in_a_batch_with_labels(
    encoder: Encoder, packed: bool
) -> None:
    torch.manual_seed(0)
    base: Any = load_base(BaseModelConfig(num_layers=2, dtype="float32", packed_rows=packed))
    assert (base.config._attn_implementation == packed_attention.NAME) is packed
    adapted = build_adapter(AdapterConfig(r=4, lora_dropout=0.0), base, [task.name for task in TASKS])
    with torch.no_grad():
        for layer in adapted.adapted_layers().values():
            layer.lora_B.normal_(0, 0.02)
            layer.lora_transform.normal_(0, 0.5)
    examples = encoder.encode(SAMPLES)
    batch = pack(examples)
    losses = label_loss(LabelScorer(adapted)(batch), batch)
    for example, loss in zip(examples, losses, strict=True):
        if not example.is_written:
            alone = pack([example])
            expected = label_loss(LabelScorer(adapted)(alone), alone)[0]
        else:
            row = torch.tensor([[*example.prompt, *example.words[0]]])
            labels = row.clone()
            labels[0, : len(example.prompt)] = -100
            expected = adapted(input_ids=row, labels=labels, task_ids=torch.tensor([example.task])).loss
        torch.testing.assert_close(loss, expected, atol=2e-5, rtol=1e-5)
    losses.sum().backward()
    assert all(p.grad.isfinite().all() for p in adapted.parameters() if p.grad is not None)


def test_prompts_of_answers_share_their_beginnings_and_count_in_the_budget(encoder: Encoder) -> None:
    first, third = encoder.encode([SAMPLES[0], SAMPLES[2]])
    together = pack([first, third])
    read = [len(e.prompt) + len(e.words[0]) - 1 for e in (first, third)]
    assert together.num_tokens == sum(read)
    assert len(together.input_ids) == sum(read) - len(first.prompt)  # one prompt, computed once
    assert len(micro_batches([first, third], len(together.input_ids) - 1)) == 2


def test_what_the_model_cannot_write_is_refused_before_anything_is_trained(tokenizer: Any) -> None:
    long = COLOUR.model_copy(update={"generation": COLOUR.generation.model_copy(update={"max_new_tokens": 44})})
    with pytest.raises(InputError, match=r"max_new_tokens must leave 8 of model\.max_length = 48"):
        Encoder(tokenizer, [long], 48)
    for task in (COLOUR, WRITTEN_SPAM):
        with pytest.raises(InputError, match="an encoder writes no text"):
            check_base(BaseModelConfig(base="minilm-l6"), [task])
