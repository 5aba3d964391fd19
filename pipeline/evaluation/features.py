"""Where a model puts the samples of each task: the hidden state that answers, and its plane by t-SNE.

The paper's figure 1 shows that LoRA mixes the tasks' features and MTL-LoRA keeps them apart.
Axes: N samples, H hidden, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.contracts import Sample
from pipeline.evaluation.frame import Floats

CHUNK = 16


@dataclass(frozen=True)
class TaskFeatures:
    """Features of samples.

    Args:
        features: (N, H) hidden state at the answer position.
        tasks: (N,) task of each sample.
    """

    features: Floats
    tasks: list[str]


def task_features(scorer: Any, samples: Sequence[Sample]) -> TaskFeatures:
    """Return the hidden state from which each sample is answered.

    Args:
        scorer: a :class:`pipeline.modeling.scoring.Scorer`.
        samples: of any tasks.
    """
    import torch

    seen: list[Any] = []
    embeddings = scorer.model.language_model.get_output_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].float().cpu()))
    parts = []
    try:
        with torch.inference_mode():
            for first in range(0, len(samples), CHUNK):
                batch = scorer.encoder.collate(scorer.encoder.encode(samples[first : first + CHUNK])).to(scorer.device)
                scorer.model(batch)
                # The first answer position of an example is its prompt's end; further ones are within long words.
                owner = batch.term_slot // batch.class_mask.shape[1]
                start = torch.full((len(batch.class_mask),), len(seen[-1]), device=owner.device)
                start = start.scatter_reduce(0, owner, batch.term_answer, "amin")
                parts.append(seen.pop()[start.cpu()].double().numpy())
    finally:
        hook.remove()
    return TaskFeatures(np.concatenate(parts), [sample.task for sample in samples])


def plane(features: Floats, seed: int = 0) -> Floats:
    """Return the samples' places in a plane by t-SNE on up to 50 principal components, (N, 2), deterministic."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count = min(50, *features.shape)
    reduced = PCA(count, random_state=seed).fit_transform(features)
    perplexity = max(2.0, min(30.0, (len(features) - 1) / 3))
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced).astype(np.float64)


def separation(found: TaskFeatures) -> float:
    """Return the silhouette of the tasks in feature space, from -1 to 1: how far apart the tasks are (no plane)."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(found.features, found.tasks, metric="cosine"))
