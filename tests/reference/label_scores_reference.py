"""Label scores by their definition: a row and a forward for each label word, whole logits, no batch, no padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


@torch.no_grad()
def label_probabilities(model: Any, prompt: list[int], words: list[list[int]]) -> np.ndarray:
    """Softmax over the words of the sum of their tokens' log-likelihoods after the prompt.

    Args:
        model: a Hugging Face causal language model.
        prompt: token ids.
        words: token ids of each label word.
    """
    scores = []
    for word in words:
        row = torch.tensor([[*prompt, *word]])
        logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
        log_p = logits.double().log_softmax(-1)
        scores.append(sum(log_p[len(prompt) - 1 + j, token].item() for j, token in enumerate(word)))
    return np.exp(np.array(scores) - np.logaddexp.reduce(scores))
