from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.encoding import Encoder
from pipeline.modeling.packing import Example, pack
from pipeline.modeling.scoring import LabelScorer, Scorer, label_loss

BINARY = TaskSpec(name="spam", template="Message: {text}\nSpam:", label_words=(" no", " yes"))
LONG_WORDS = TaskSpec(
    name="intent",
    kind="multiclass",
    template="Query: {text}\nIntent:",
    label_words=(" card arrival", " card", " cash withdrawal fee"),
)
NORMALISED = LONG_WORDS.model_copy(update={"name": "normalised", "length_normalized": True})
CHOICE = TaskSpec(name="quiz", kind="choice", template="Question: {question}\nAnswer:")
ORDINAL = TaskSpec(
    name="likeness",
    kind="ordinal",
    template="{text}\nScore:",
    label_words=(" 0", " 1", " 2"),
    label_values=(0.0, 2.5, 5.0),
)
SPECS = (BINARY, LONG_WORDS, NORMALISED, CHOICE, ORDINAL)
SAMPLES = [
    Sample(key="a", task="spam", fields={"text": "you have won a free prize, call now"}, label=1),
    Sample(key="b", task="intent", fields={"text": "where is my card?"}, label=0),
    Sample(key="c", task="normalised", fields={"text": "why was I charged?"}, label=2),
    Sample(key="d", task="quiz", fields={"question": "what do bees make?"}, choices=("honey", "the blue sea"), label=0),
    Sample(key="e", task="spam", fields={"text": "see you at eight"}, label=0),
    Sample(key="f", task="likeness", fields={"text": "a cat sat"}, label=1.0),
]


@pytest.fixture(scope="module")
def base(small_base: BaseModelConfig) -> Any:
    return load_base(small_base)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, SPECS, max_length=48)


def _slow_probabilities(base: Any, tokenizer: Any, sample: Sample, spec: TaskSpec) -> np.ndarray:
    """The definition: log-likelihood of each word after the prompt, one whole forward a word, softmax over words."""
    prompt = tokenizer(spec.template.format_map(sample.fields))["input_ids"]
    scores = []
    for word in spec.label_words or [f" {choice}" for choice in sample.choices]:
        tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = base(torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
        score = sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(tokens))
        scores.append(score / len(tokens) if spec.length_normalized else score)
    return torch.stack(scores).softmax(0).numpy()


def test_probabilities_equal_the_definition(base: Any, tokenizer: Any, encoder: Encoder) -> None:
    scorer = Scorer(LabelScorer(base), encoder, batch_tokens=96)
    by_name = {spec.name: spec for spec in SPECS}
    for sample, got in zip(SAMPLES, scorer.probabilities(SAMPLES), strict=True):
        expected = _slow_probabilities(base, tokenizer, sample, by_name[sample.task])
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_mixed_batch_equals_one_sample_at_a_time(small_base: BaseModelConfig, encoder: Encoder) -> None:
    adapted = build_adapter(AdapterConfig(r=4), load_base(small_base), [spec.name for spec in SPECS])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    scorer = Scorer(LabelScorer(adapted), encoder)
    together = scorer.probabilities(SAMPLES)
    alone = [scorer.probabilities([sample])[0] for sample in SAMPLES]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_untrained_adapter_answers_as_the_base(small_base: BaseModelConfig, base: Any, encoder: Encoder) -> None:
    adapted = build_adapter(AdapterConfig(), load_base(small_base), [spec.name for spec in SPECS])
    with_adapter = Scorer(LabelScorer(adapted), encoder).probabilities(SAMPLES)
    for one, other in zip(with_adapter, Scorer(LabelScorer(base), encoder).probabilities(SAMPLES), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_loss_is_cross_entropy_and_its_gradient_is_finite_beside_missing_classes(base: Any, encoder: Encoder) -> None:
    batch = encoder.collate(encoder.encode(SAMPLES))
    scorer = LabelScorer(base)
    weight = base.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    log_probabilities = scorer(batch)
    losses = label_loss(log_probabilities, batch)
    expected = torch.stack([-log_probabilities[i, int(s.label)] for i, s in enumerate(SAMPLES[:5])])
    torch.testing.assert_close(losses[:5], expected)
    losses.mean().backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()
    assert weight.grad.abs().sum() > 0
    weight.requires_grad_(False)


def test_ordinal_target_has_the_label_as_its_expected_value(encoder: Encoder) -> None:
    for label in (0.0, 1.0, 2.5, 4.9, 5.0, 7.0):
        sample = Sample(key="x", task="likeness", fields={"text": "a"}, label=label)
        (example,) = encoder.encode([sample])
        expected = sum(p * v for p, v in zip(example.target, ORDINAL.label_values, strict=True))
        assert sum(example.target) == pytest.approx(1)
        assert expected == pytest.approx(min(label, 5.0))


def test_single_token_words_cost_their_prompt_alone(encoder: Encoder) -> None:
    examples = encoder.encode([SAMPLES[0], SAMPLES[4]])
    batch = encoder.collate(examples)
    assert sum(len(rows) for rows in batch.rows) == len(batch.answer) == 2
    assert batch.num_tokens == sum(len(example.prompt) for example in examples)


def test_long_prompt_loses_its_field_and_keeps_its_question(encoder: Encoder, tokenizer: Any) -> None:
    sample = Sample(key="x", task="spam", fields={"text": "prize " * 400}, label=0)
    (example,) = encoder.encode([sample])
    assert len(example.prompt) <= 48
    text = tokenizer.decode(example.prompt)
    assert text.startswith("Message: prize")
    assert text.endswith("\nSpam:")


def test_word_that_merges_with_the_prompt_is_refused(tokenizer: Any) -> None:
    spec = TaskSpec(name="t", template="{text} answer", label_words=("s", " no"))
    with pytest.raises(InputError, match="must stand alone after the prompt, got 's'"):
        Encoder(tokenizer, [spec], 48)


def test_unknown_task_is_refused_with_the_nearest_name(encoder: Encoder) -> None:
    with pytest.raises(InputError, match="got 'spamm'; did you mean 'spam'"):
        encoder.encode([SAMPLES[0].model_copy(update={"task": "spamm"})])


def test_template_longer_than_the_limit_is_refused(tokenizer: Any) -> None:
    spec = TaskSpec(name="t", template="word " * 60 + "{text}:", label_words=(" no", " yes"))
    with pytest.raises(InputError, match=r"must fit model.max_length = 48"):
        Encoder(tokenizer, [spec], 48).encode([Sample(key="x", task="t", fields={"text": "a b"}, label=0)])


@pytest.mark.parametrize("length", range(20, 34))
def test_text_that_ends_in_a_character_of_several_tokens_is_cut(tokenizer: Any, length: int) -> None:
    spec = TaskSpec(name="t", template="Q: {text}\nA:", label_words=(" no", " yes"))
    sample = Sample(key="x", task="t", fields={"text": "word " * 20 + "\N{PARROT}" * 4}, label=0)
    (example,) = Encoder(tokenizer, [spec], length).encode([sample])
    assert len(example.prompt) <= length
    assert tokenizer.decode(example.prompt).endswith("\nA:")


class _Closing:
    """A tokenizer that puts the end after every text, as some do."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.eos_token_id = tokenizer, tokenizer.eos_token_id

    def __call__(self, text: Any, add_special_tokens: bool = True, **options: Any) -> Any:
        found = self.tokenizer(text, add_special_tokens=False, **options)
        if add_special_tokens:
            ids = found["input_ids"]
            found["input_ids"] = (
                [[*i, self.eos_token_id] for i in ids] if isinstance(text, list) else [*ids, self.eos_token_id]
            )
        return found


@pytest.mark.parametrize("words", [3, 300])
def test_no_prompt_ends_with_the_end_of_texts(tokenizer: Any, words: int) -> None:
    sample = SAMPLES[0].model_copy(update={"fields": {"text": "prize " * words}})
    (example,) = Encoder(_Closing(tokenizer), SPECS, 48).encode([sample])
    assert tokenizer.decode(example.prompt).endswith("\nSpam:")


@pytest.mark.parametrize(
    ("family", "options"),
    [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.25}), ("gemma2", {"head_dim": 8})],
)
def test_scores_are_those_of_the_models_own_head(family: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    shape = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    if family == "gemma2":
        shape.final_logit_softcapping = 0.02
    model = AutoModelForCausalLM.from_config(shape).eval()
    batch = pack([Example("t/0", 0, (5, 6, 7), ((8,), (9,), (10, 11)), (1.0, 0.0, 0.0), False)])
    with torch.no_grad():
        got = LabelScorer(model)(batch)[0]
        log_p = model(torch.tensor([[5, 6, 7, 10]])).logits[0].log_softmax(-1)
    expected = torch.stack([log_p[2, 8], log_p[2, 9], log_p[2, 10] + log_p[3, 11]]).log_softmax(0)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_choice_that_is_offered_twice_scores_twice_the_same(base: Any, encoder: Encoder) -> None:
    sample = SAMPLES[3].model_copy(update={"choices": ("honey", " honey", "the blue sea")})
    (found,) = Scorer(LabelScorer(base), encoder).probabilities([sample])
    assert found[0] == found[1]
    assert found.sum() == pytest.approx(1)
