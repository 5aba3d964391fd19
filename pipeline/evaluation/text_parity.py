"""Whether two models write the same: their tokens, greedily, and where those part, how nearly both were a tie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.contracts import Sample, TaskSpec
from pipeline.generation import GenerationConfig

_TOKENS = 1024
"""Most tokens that go through a model at once."""


def greedily(spec: TaskSpec) -> TaskSpec:
    """Return a task whose answers are the likeliest tokens one by one: beams would compare whole sentences."""
    greedy = GenerationConfig(max_new_tokens=spec.generation.max_new_tokens)
    return spec.model_copy(update={"generation": greedy}) if spec.is_written else spec


def tokens_by(scorer: Any, encoder: Any, samples: Sequence[Sample]) -> list[tuple[int, ...]]:
    """Return what a model writes, the end token left out.

    Args:
        scorer: a :class:`pipeline.modeling.scoring.LabelScorer` in evaluation mode.
        encoder: a :class:`pipeline.modeling.encoding.Encoder`.
        samples: of tasks whose answers are written.
    """
    from pipeline.modeling.writing import written_tokens

    where = next(scorer.parameters()).device
    return written_tokens(scorer.generate, encoder, samples, _TOKENS, where)


def largest_gap(
    model: Any,
    encoder: Any,
    samples: Sequence[Sample],
    expected: Sequence[tuple[int, ...]],
    found: Sequence[tuple[int, ...]],
) -> float:
    """Return how far apart two models' answers are: 0 where all tokens are equal.

    Where two answers part, it is the difference of the log-probabilities that ``model`` gives the two tokens there: a
    rounding error's size where both were as likely.

    Args:
        model: the Hugging Face model that wrote ``found``.
        encoder: as in :func:`tokens_by`.
        samples: what was asked.
        expected: the one model's tokens.
        found: the other's.
    """
    from pipeline.modeling.image_inputs import row_arguments

    largest = 0.0
    end = encoder.tokenizer.eos_token_id
    for prompt, one, other in zip(encoder.prompts(samples), expected, found, strict=True):
        if one == other:
            continue
        ours, theirs = (*one, end), (*other, end)
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        arguments = row_arguments(model, prompt.ids, prompt.image, ours[:at])
        with torch.inference_mode():
            log_p = model(**arguments).logits[0, -1].double().log_softmax(-1)
        largest = max(largest, float(log_p[theirs[at]] - log_p[ours[at]]))
    return largest
