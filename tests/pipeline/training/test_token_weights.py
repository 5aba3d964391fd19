"""Every token of a step weighs alike, whatever ranks its samples are on."""

from __future__ import annotations

import pytest
import torch

from pipeline.contracts import TaskSpec
from pipeline.modeling.packing import Example
from pipeline.training.token_weights import TokenWeights

SPAM = TaskSpec(name="spam", template="{text}:", label_words=(" no", " yes"))
BY_SAMPLE = TaskSpec(name="short", kind="generation", template="{text}:")
BY_TOKEN = TaskSpec(name="long", kind="generation", template="{text}:", generation={"loss": "token"})


def _written(task: int, length: int, weight: float = 1.0) -> Example:
    return Example(f"{task}/{length}", task, (1, 2), (tuple(range(length)),), (1.0,), True, weight, True)


def test_the_weighted_sum_is_the_number_of_samples_times_the_mean_over_tokens() -> None:
    weights = TokenWeights([SPAM, BY_SAMPLE, BY_TOKEN], torch.device("cpu"))
    ranks = [[_written(2, 1), _written(1, 5)], [_written(2, 7), _written(2, 4, weight=2.0)]]
    counts = sum(weights.counts(rank) for rank in ranks)
    assert isinstance(counts, torch.Tensor)
    found = [e for rank in ranks for e in weights.weighed(rank, counts)]
    mean = (1 + 7 + 4) / 3
    assert [e.weight for e in found] == pytest.approx([1 / mean, 1.0, 7 / mean, 2 * 4 / mean])


def test_steps_without_such_a_task_are_left_as_they_are() -> None:
    weights = TokenWeights([SPAM, BY_SAMPLE], torch.device("cpu"))
    examples = [Example("spam/0", 0, (1, 2), ((3,), (4,)), (1.0, 0.0), False), _written(1, 3)]
    assert weights.weigh(examples, 2) is examples
