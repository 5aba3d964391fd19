"""From samples to the tokens that score them.

A class's score is the log-likelihood of its label word right after the prompt. The first token of every word is read
off the prompt's own last position; only words of several tokens need more of the model, their tokens less the last.
So a task whose words are single tokens costs its prompt and one answer position a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError, did_you_mean
from pipeline.label_names import class_set
from pipeline.modeling.packing import Batch, Example, HeadExample, pack

_NEEDS_HEADS = {
    "multilabel": "make a binary task of each label",
    "regression": "kind: ordinal with label_words for some label_values of the scale",
}
"""Kinds that only a head can answer, and what a language model can be asked instead."""


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

    def _spec(self, sample: Sample) -> TaskSpec:
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
        self._words = {s.name: self._word_tokens(s, s.label_words) for s in self.specs if s.label_words}

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
        specs = [self._spec(sample) for sample in samples]
        prompts = [spec.template.format_map(sample.fields) for spec, sample in zip(specs, samples, strict=True)]
        encoded = self.tokenizer(prompts)["input_ids"] if prompts else []
        examples = []
        for spec, sample, ids in zip(specs, samples, encoded, strict=True):
            words = self._words.get(spec.name) or self._word_tokens(
                spec, [self._choice(c) for c in sample.choices], f", sample {sample.key!r}"
            )
            room = self.max_length - max(len(word) for word in words) + 1
            ids = self._open(ids)
            if len(ids) > room:
                ids = self._fit(spec, sample, room)
            self._refuse_beyond(sample, (*ids, *(token for word in words for token in word)))
            target = target_of(spec, sample, len(words))
            name, task = f"{sample.task}/{sample.key}", self.task_index[spec.name]
            weight = sample.weight * spec.loss_weight(sample.label)
            examples.append(Example(name, task, tuple(ids), words, target, spec.length_normalized, weight))
        return examples

    @staticmethod
    def _choice(text: str) -> str:
        return text if text.startswith(" ") else f" {text}"

    def _fit(self, spec: TaskSpec, sample: Sample, room: int) -> list[int]:
        texts = {name: sample.fields[name] for name in spec.text_fields}
        while True:
            ids = self._open(self.tokenizer(spec.template.format_map(texts))["input_ids"])
            if len(ids) <= room:
                return ids
            longest = max(texts, key=lambda name: len(texts[name]))
            offsets = self.tokenizer(texts[longest], add_special_tokens=False, return_offsets_mapping=True)[
                "offset_mapping"
            ]
            keep = max(1, len(offsets) - (len(ids) - room))
            if len(offsets) < 2:
                raise InputError(
                    f"task {spec.name!r}: template and label words must fit model.max_length = {self.max_length} "
                    f"tokens, the prompt has {len(ids)} with its fields cut away; raise model.max_length"
                )
            # Several tokens may be parts of one character: what follows the kept ones goes, at least one character.
            end = min(offsets[keep][0], len(texts[longest]) - 1)
            texts[longest] = texts[longest][: max(end, 0)]


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
