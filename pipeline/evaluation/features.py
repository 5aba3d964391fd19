"""Where a model puts the samples of each task: the hidden state that answers, and its plane by t-SNE.

The paper's figure 1 shows that LoRA mixes the tasks' features and MTL-LoRA keeps them apart.
Axes: N samples, H hidden, T tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.contracts import write_atomic
from pipeline.evaluation.score_table import Floats
from pipeline.json_text import parse_json


@dataclass(frozen=True)
class TaskFeatures:
    """Features of samples.

    Args:
        features: (N, H) hidden state at the answer position.
        tasks: (N,) task of each sample.
        keys: (N,) key of each sample in its task.
    """

    features: Floats
    tasks: list[str]
    keys: list[str]


def write_features(path: Path, states: Mapping[tuple[str, str], np.ndarray]) -> None:
    """Write the hidden states (H,) of samples by task and key, sorted, as safetensors, atomically."""
    from safetensors.numpy import save

    names = sorted(states)
    stacked = np.stack([states[name] for name in names]).astype(np.float32)
    write_atomic(path, save({"features": stacked}, {"samples": json.dumps(names)}))


def read_features(path: Path) -> TaskFeatures:
    """Read what :func:`write_features` wrote."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        names = parse_json(file.metadata()["samples"])
        features = file.get_tensor("features").astype(np.float64)
    return TaskFeatures(features, [task for task, _ in names], [key for _, key in names])


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
