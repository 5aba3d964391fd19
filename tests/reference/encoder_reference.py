"""Class scores of an encoder with heads by their definition: one row at a time, no padding, no packing, plain loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def class_log_probabilities(
    model: Any,
    rows: Sequence[Sequence[int]],
    token_types: Sequence[Sequence[int]] | None,
    weight_CH: Tensor,
    bias_C: Tensor,
    pooling: str,
) -> Tensor:
    """Return the log-probabilities (C,) of one sample's classes.

    Args:
        model: a Hugging Face encoder as transformers loads it; ``model(**inputs)`` gives its states.
        rows: token ids of its rows: one for all classes, or one a class.
        token_types: of the same rows; None where the model knows no segments.
        weight_CH: for each class the row of its head.
        bias_C: for each class.
        pooling: ``first`` or ``mean``.
    """
    states = []
    for place, row in enumerate(rows):
        inputs = {"input_ids": torch.tensor([list(row)])}
        if token_types is not None:
            inputs["token_type_ids"] = torch.tensor([list(token_types[place])])
        found = model(**inputs).last_hidden_state[0]
        states.append(found[0] if pooling == "first" else sum(found) / len(found))
    scores = []
    for c in range(len(weight_CH)):
        state = states[c] if len(states) > 1 else states[0]
        scores.append(sum(state[h] * weight_CH[c, h] for h in range(len(state))) + bias_C[c])
    return torch.stack(scores).log_softmax(0)
