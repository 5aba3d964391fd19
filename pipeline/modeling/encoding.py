"""From samples to the tokens that score them.

A class's score is the log-likelihood of its label word right after the prompt. The first token of every word is read
off the prompt's own last position; only words of several tokens need more of the model, their tokens less the last.
So a task whose words are single tokens costs its prompt and one answer position a sample. A written answer is its own
only word, ended by the model's end token: every one of its tokens is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.answer import answer_texts
from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError, did_you_mean
from pipeline.label_names import class_set
from pipeline.modeling.image_inputs import ImageInputs
from pipeline.modeling.packing import Batch, Example, HeadExample, pack

_NEEDS_HEADS = {
    "multilabel": "make a binary task of each label",
    "regression": "kind: ordinal with label_words for some label_values of the scale",
}
"""Kinds that only a head can answer, and what a language model can be asked instead."""
_SHORTEST_PROMPT = 8
"""Tokens that a prompt must have room for beside the longest answer."""


class Prompt(NamedTuple):
    """What a model is shown of a sample before it answers."""

    ids: tuple[int, ...]
    image: ImageInputs | None = None


class SampleEncoder:
    """Tokenises samples of some tasks for one base model.

    Args:
        tokenizer: the base model's fast tokenizer; where it has ``num_embeddings``, further tokens are refused.
        specs: the tasks; their order gives the task index.
        max_length: longest row in tokens.
    """

    def __init__(self, tokenizer: Any, specs: Sequence[TaskSpec], max_length: int) -> None:
        self.tokenizer, self.specs, self.max_length = tokenizer, tuple(specs), max_length
        self._num_embeddings: int | None = getattr(tokenizer, "num_embeddings", None)
        self.task_index = {spec.name: index for index, spec in enumerate(specs)}

    def encode(self, samples: Sequence[Sample]) -> Sequence[Example | HeadExample]:
        """Tokenise samples."""
        raise NotImplementedError

    def label_tokens(self, task: str) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of each label word of a task; none where it is not asked for words."""
        return ()

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Lay examples out as one batch, in the given order."""
        return pack(examples)

    def spec_of(self, sample: Sample) -> TaskSpec:
        """Return a sample's task.

        Raises:
            InputError: it is none of the model's.
        """
        if sample.task not in self.task_index:
            raise InputError(
                f"a sample's task must be one of the model's, got {sample.task!r}"
                f"{did_you_mean(sample.task, self.task_index)}"
            )
        return self.specs[self.task_index[sample.task]]

    def _refuse_beyond(self, sample: Sample, ids: Sequence[int]) -> None:
        highest = max(ids)
        if self._num_embeddings is not None and highest >= self._num_embeddings:
            raise InputError(
                f"a prompt's tokens must be the model's, sample {sample.task}/{sample.key} has the token "
                f"{self.tokenizer.convert_ids_to_tokens(highest)!r}, of which the model has no vector; take it out of "
                "the text"
            )


class Encoder(SampleEncoder):
    """Tokenises samples by their task's template and label words.

    Args:
        tokenizer: the base model's fast tokenizer; where it has ``num_embeddings``, further tokens are refused.
        specs: the tasks; their order gives the task index.
        max_length: longest row in tokens; the longest field of a longer prompt loses its end, never the template.

    Raises:
        InputError: two label words of a task share their tokens, or a word does not stand alone after the prompt.
    """

    def __init__(self, tokenizer: Any, specs: Sequence[TaskSpec], max_length: int) -> None:
        super().__init__(tokenizer, specs, max_length)
        for spec in self.specs:
            if spec.kind in _NEEDS_HEADS:
                raise InputError(
                    f"task {spec.name!r}: a language model scores one of several label words, got kind {spec.kind!r}; "
                    f"take an encoder as model.base, such as minilm-l6, or {_NEEDS_HEADS[spec.kind]}"
                )
            if not spec.template or spec.labels:
                raise InputError(
                    f"task {spec.name!r}: a language model answers by label words after a template, got "
                    f"{'no template' if not spec.template else 'labels'}; give both, or take an encoder as model.base"
                )
            if spec.is_written:
                self._check_written(spec)
        scored = [spec for spec in self.specs if spec.label_words and not spec.is_written]
        self._words = {spec.name: self._word_tokens(spec, spec.label_words) for spec in scored}

    def label_tokens(self, task: str) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of each label word of a task; none where its records bring the answers."""
        return self._words.get(task, ())

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _open(self, ids: list[int]) -> list[int]:
        """Take away the end that some tokenizers put after every text: the answer is still to come."""
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def _word_tokens(self, spec: TaskSpec, words: Sequence[str], where: str = "") -> tuple[tuple[int, ...], ...]:
        tail = spec.template[-1]
        anchor = self._ids(tail)
        tokens = []
        for word in words:
            joined = self._ids(tail + word)
            if joined[: len(anchor)] != anchor or len(joined) == len(anchor):
                raise InputError(
                    f"task {spec.name!r}{where}: a label word must stand alone after the prompt, got {word!r} after "
                    f"{tail!r}; begin it with a space: {' ' + word.strip()!r}"
                )
            tokens.append(tuple(joined[len(anchor) :]))
        if spec.label_words and len(set(tokens)) != len(tokens):  # a question may offer one answer twice
            raise InputError(
                f"task {spec.name!r}: label words must differ in their tokens, got {list(words)}; reword one"
            )
        return tuple(tokens)

    def encode(self, samples: Sequence[Sample]) -> list[Example]:
        """Tokenise samples.

        Raises:
            InputError: a sample's task is unknown, its prompt cannot be cut to ``max_length``, or has a token that
                the model's embedding has not.
        """
        specs, encoded = self._encoded(samples)
        examples = []
        for spec, sample, prompt in zip(specs, samples, encoded, strict=True):
            words = self._words.get(spec.name) or self._words_of(spec, sample)
            ids, image = self._fit(spec, sample, prompt, self._room(spec, words))
            self._refuse_beyond(sample, (*ids, *(token for word in words for token in word)))
            target = (1.0,) if spec.is_written else target_of(spec, sample, len(words))
            name, task = f"{sample.task}/{sample.key}", self.task_index[spec.name]
            weight = sample.weight * spec.loss_weight(sample.label)
            is_mean = spec.length_normalized or spec.is_written
            examples.append(Example(name, task, ids, words, target, is_mean, weight, spec.is_written, image))
        return examples

    def prompts(self, samples: Sequence[Sample]) -> list[Prompt]:
        """Tokenise the prompts alone of samples whose answers are to be written.

        Raises:
            InputError: as :meth:`encode`.
        """
        prompts = []
        for spec, prompt, sample in zip(*self._encoded(samples), samples, strict=True):
            prompts.append(self._fit(spec, sample, prompt, self._room(spec, ())))
            self._refuse_beyond(sample, prompts[-1].ids)
        return prompts

    def _encoded(self, samples: Sequence[Sample]) -> tuple[list[TaskSpec], list[Prompt]]:
        specs = [self.spec_of(sample) for sample in samples]
        texts = [spec.template.format_map(sample.fields) for spec, sample in zip(specs, samples, strict=True)]
        encoded = self.tokenizer(texts)["input_ids"] if texts else []
        return specs, [Prompt(tuple(self._open(ids))) for ids in encoded]

    def _prompt(self, spec: TaskSpec, sample: Sample, fields: Mapping[str, str]) -> Prompt:
        """Return the prompt of a sample with these texts in the place of its own."""
        return Prompt(tuple(self._open(self.tokenizer(spec.template.format_map(fields))["input_ids"])))

    def _room(self, spec: TaskSpec, words: Sequence[Sequence[int]]) -> int:
        """Return the most tokens of a prompt; one whose answer is written leaves room for the longest one."""
        if spec.is_written:
            return self.max_length - spec.generation.max_new_tokens
        return self.max_length - max((len(word) for word in words), default=1) + 1

    def _check_written(self, spec: TaskSpec) -> None:
        if self.tokenizer.eos_token_id is None:
            raise InputError(
                f"task {spec.name!r}: an answer that is written ends with the model's end token, and the tokenizer "
                "has none; set its eos_token and save it anew, or take another base"
            )
        if spec.generation.max_new_tokens > self.max_length - _SHORTEST_PROMPT:
            raise InputError(
                f"task {spec.name!r}: generation.max_new_tokens must leave {_SHORTEST_PROMPT} of model.max_length = "
                f"{self.max_length} tokens to the prompt, got {spec.generation.max_new_tokens}; lower the one or "
                "raise the other"
            )

    def _words_of(self, spec: TaskSpec, sample: Sample) -> tuple[tuple[int, ...], ...]:
        if spec.is_written:
            return (self._written(spec, answer_texts(spec, sample)[0]),)
        return self._word_tokens(spec, [self._choice(c) for c in sample.choices], f", sample {sample.key!r}")

    def _written(self, spec: TaskSpec, text: str) -> tuple[int, ...]:
        """Return the tokens of an answer right after the prompt, with the end token where they leave room for it."""
        tail = spec.template[-1]
        text = text if tail.isspace() else self._choice(text)
        anchor, joined = self._ids(tail), self._ids(tail + text)
        # Where a tokenizer draws the answer's beginning into the prompt's end, the answer is tokenised by itself.
        ids = joined[len(anchor) :] if joined[: len(anchor)] == anchor else self._ids(text)
        most = spec.generation.max_new_tokens
        return (*self._open(ids), self.tokenizer.eos_token_id)[:most]

    @staticmethod
    def _choice(text: str) -> str:
        return text if text.startswith(" ") else f" {text}"

    def _fit(self, spec: TaskSpec, sample: Sample, prompt: Prompt, room: int) -> Prompt:
        """Return a prompt of at most so many tokens: where it has more, its longest field loses its end."""
        texts = {name: sample.fields[name] for name in spec.text_fields}
        while len(prompt.ids) > room:
            longest = max(texts, key=lambda name: len(texts[name]))
            offsets = self.tokenizer(texts[longest], add_special_tokens=False, return_offsets_mapping=True)[
                "offset_mapping"
            ]
            keep = max(1, len(offsets) - (len(prompt.ids) - room))
            if len(offsets) < 2:
                raise InputError(
                    f"task {spec.name!r}: template and label words must fit model.max_length = {self.max_length} "
                    f"tokens, the prompt has {len(prompt.ids)} with its fields cut away; raise model.max_length"
                )
            # Several tokens may be parts of one character: what follows the kept ones goes, at least one character.
            end = min(offsets[keep][0], len(texts[longest]) - 1)
            texts[longest] = texts[longest][: max(end, 0)]
            prompt = self._prompt(spec, sample, texts)
        return prompt


def scale_of(spec: TaskSpec) -> tuple[float, float]:
    """Return the number that a regression task's score of 0 stands for, and by how much a score of 1 is more."""
    if spec.kind != "regression":
        return 0.0, 1.0
    low, high = spec.label_values
    return (low + high) / 2, (high - low) / 2


def target_of(spec: TaskSpec, sample: Sample, num_classes: int) -> tuple[float, ...]:
    """Return the probability of each class under a sample's label; of a regression task the label on its scale."""
    if spec.kind == "multilabel":
        return tuple(map(float, class_set(sample.label, num_classes)))
    if spec.kind == "regression":
        middle, half = scale_of(spec)
        return ((sample.label - middle) / half,)
    target = [0.0] * num_classes
    if spec.kind != "ordinal":
        target[int(sample.label)] = 1.0
        return tuple(target)
    # Between two values the label's mass is shared so that the expected value is the label itself.
    order = sorted(range(num_classes), key=lambda c: spec.label_values[c])
    values = [spec.label_values[c] for c in order]
    value = min(max(sample.label, values[0]), values[-1])
    upper = next(i for i, v in enumerate(values) if v >= value)
    lower = max(upper - 1, 0)
    share = 1.0 if upper == lower else (value - values[lower]) / (values[upper] - values[lower])
    target[order[lower]] += 1.0 - share
    target[order[upper]] += share
    return tuple(target)
