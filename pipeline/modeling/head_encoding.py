"""From samples to the tokens that an encoder reads: the tokenizer's own segments, no label words.

A task's first text stands in the first segment, its others in the second one; an answer to choose is a second segment
of its own, read with the question. A task's ``segments`` say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.modeling.encoding import SampleEncoder, scale_of, target_of
from pipeline.modeling.packing import HeadExample, Link

_LINK_OF_KIND: dict[str, Link] = {"multilabel": "sigmoid", "regression": "identity"}


def head_classes(specs: Sequence[TaskSpec]) -> tuple[int, ...]:
    """Return how many rows each task's head has: its classes, or the one that scores each answer to choose."""
    return tuple(spec.num_classes or 1 for spec in specs)


def segment_templates(spec: TaskSpec) -> tuple[str, ...]:
    """Return the templates of a task's one or two segments, the one before the answer for ``choice``."""
    if spec.segments:
        return spec.segments
    first, *others = (f"{{{name}}}" for name in spec.text_fields)
    if spec.kind == "choice":
        return (" ".join((first, *others)),)
    return (first, " ".join(others)) if others else (first,)


class HeadEncoder(SampleEncoder):
    """Tokenises samples for an encoder with a head a task.

    Args:
        tokenizer: the base model's fast tokenizer; where it has ``num_embeddings``, further tokens are refused.
        specs: the tasks; their order gives the task index.
        max_length: longest row in tokens; the longer segment of a longer one loses its end.

    Raises:
        InputError: a task's answer is written.
    """

    def __init__(self, tokenizer: Any, specs: Sequence[TaskSpec], max_length: int) -> None:
        super().__init__(tokenizer, specs, max_length)
        for spec in self.specs:
            if spec.is_written:
                raise InputError(
                    f"task {spec.name!r}: an encoder writes no text, it has a head that tells classes apart, got "
                    f"{'kind: generation' if spec.kind == 'generation' else 'answer_by: generation'}; take a causal "
                    "language model as model.base, or a kind with labels"
                )
        self._segments = {spec.name: segment_templates(spec) for spec in self.specs}
        classes = head_classes(self.specs)
        self._first_row = dict(zip(self.task_index, accumulate((0, *classes[:-1])), strict=True))

    def share_heads(self) -> None:
        """Let tasks whose classes have the same names answer by one head, the first such task's: what a language
        model's label words do, so that nothing but prompt and adapter tells these tasks apart."""
        first: dict[tuple[str, ...], int] = {}
        for spec in self.specs:
            kind = (spec.kind, *spec.class_names)
            self._first_row[spec.name] = first.setdefault(kind, self._first_row[spec.name])

    def encode(self, samples: Sequence[Sample]) -> list[HeadExample]:
        """Tokenise samples.

        Raises:
            InputError: a sample's task is unknown, or its text has a token that the model's embedding has not.
        """
        specs = [self.spec_of(sample) for sample in samples]
        texts = [self._texts(spec, sample) for spec, sample in zip(specs, samples, strict=True)]
        encoded = iter(self._rows([row for rows in texts for row in rows]))
        examples = []
        for spec, sample, rows in zip(specs, samples, texts, strict=True):
            ids, types = zip(*(next(encoded) for _ in rows), strict=True)
            self._refuse_beyond(sample, [token for row in ids for token in row])
            first = self._first_row[spec.name]
            is_choice = spec.kind == "choice"
            head_rows = (first,) * len(rows) if is_choice else tuple(range(first, first + (spec.num_classes or 1)))
            name, task = f"{sample.task}/{sample.key}", self.task_index[spec.name]
            target = target_of(spec, sample, len(head_rows))
            weight = sample.weight * spec.loss_weight(sample.label)
            link, scale = _LINK_OF_KIND.get(spec.kind, "softmax"), scale_of(spec)
            examples.append(HeadExample(name, task, ids, types, head_rows, target, weight, link, scale))
        return examples

    def _texts(self, spec: TaskSpec, sample: Sample) -> list[tuple[str, ...]]:
        """Return the segments of each of a sample's rows."""
        filled = tuple(template.format_map(sample.fields) for template in self._segments[spec.name])
        return [(*filled, choice) for choice in sample.choices] if spec.kind == "choice" else [filled]

    def _rows(self, texts: list[tuple[str, ...]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return token ids and token types of each row."""
        found: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())] * len(texts)
        for size in {len(row) for row in texts}:
            places = [i for i, row in enumerate(texts) if len(row) == size]
            encoded = self.tokenizer(
                *([texts[i][segment] for i in places] for segment in range(size)),
                truncation="longest_first",
                max_length=self.max_length,
                return_token_type_ids=True,
            )
            for i, ids, types in zip(places, encoded["input_ids"], encoded["token_type_ids"], strict=True):
                if not ids:
                    raise InputError(
                        f"a text must have a token, got {texts[i]!r}, of which the tokenizer makes none; leave it out"
                    )
                found[i] = tuple(ids), tuple(types)
        return found
