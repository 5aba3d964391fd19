"""Figures of a comparison: where each arm puts the tasks' samples, how its tasks share it, how long it takes to answer.

The first one is the paper's figure 1: features of the last block's output projection. What stands apart there does so
by construction where an adapter is told the task.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl_lora import AdapterModel
from mtl_lora.analysis import mixing_weights
from pipeline.contracts import Sample
from pipeline.errors import InputError
from pipeline.evaluation.features import TaskFeatures, plane, separation
from pipeline.modeling.adapter import build_adapter
from pipeline.modeling.adapter_config import AdapterConfig
from pipeline.modeling.answering import class_scorer, classes_of_heads, sample_encoder, untrained_scorer
from pipeline.modeling.encoding import SampleEncoder
from pipeline.modeling.packing import micro_batches
from pipeline.modeling.scoring import Scorer
from pipeline.modeling.target_names import named_for
from pipeline.study.loaded import loaded_base
from pipeline.training.loop import TrainingJob

_TOKENS = 4096


@torch.inference_mode()
def projected(adapted: AdapterModel, encoder: SampleEncoder, samples: Sequence[Sample]) -> np.ndarray:
    """Return what the last block's output projection gives for each sample, (N, H): at the token that answers, or the
    mean over the row where the base takes that.

    Raises:
        InputError: no output projection is adapted.
    """
    name = named_for(AdapterConfig(), adapted.base_model).target_modules[-1]  # attention's four, the output the last
    paths = [path for path in adapted.plain_layers() if path.endswith(f".{name}")]
    if not paths:
        raise InputError(f"features need an adapted output projection, {name!r}, got none; add it to target_modules")
    caught: list[Tensor] = []
    hook = adapted.base_model.get_submodule(paths[-1]).register_forward_hook(
        lambda module, inputs, output: caught.append(output.detach())
    )
    reading = getattr(adapted.base_model, "row_reading", None)
    scorer, examples = class_scorer(adapted).eval(), encoder.encode(samples)
    found: list[np.ndarray] = [np.empty(0)] * len(examples)
    try:
        for part in micro_batches(examples, _TOKENS):
            batch = encoder.collate([examples[i] for i in part]).to(next(scorer.parameters()).device)
            scorer.answer(batch)
            states_MH = caught.pop().flatten(0, -2).float()
            # The last layer of many encoders goes on for the answers alone.
            answers_PH = states_MH if len(states_MH) == len(batch.answer) else states_MH[batch.answer]
            if reading is not None and reading.pooling == "mean":
                starts_M = torch.zeros(len(states_MH), dtype=torch.long).index_fill(0, batch.answer.cpu(), 1)
                rows = torch.unique_consecutive(starts_M.cumsum(0) - 1, return_counts=True)[1].tolist()
                answers_PH = torch.stack([part_SH.mean(0) for part_SH in states_MH.split(rows)])
            examples_E, classes = batch.class_mask.shape
            first_E = torch.full((examples_E,), len(answers_PH), device=answers_PH.device)
            first_E = first_E.scatter_reduce(0, batch.term_slot // classes, batch.term_answer, "amin")
            for i, state in zip(part, answers_PH[first_E].cpu().numpy(), strict=True):
                found[i] = state
    finally:
        hook.remove()
    return np.stack(found).astype(np.float64)


def features_of(title: str, features: np.ndarray, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return an arm's part of the figure: places in a plane by t-SNE, and two numbers of the whole features.

    ``silhouette`` says how far apart the tasks are, ``probe`` how often a linear classifier tells the task, on samples
    that it was not fitted to.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    tasks = [sample.task for sample in samples]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    folds = min(5, *(tasks.count(task) for task in set(tasks)))
    return {
        "title": title,
        "plane": np.round(plane(features), 2).tolist(),
        "of": tasks,
        "silhouette": separation(TaskFeatures(features, tasks, [sample.key for sample in samples])),
        "probe": float(cross_val_score(probe, features, tasks, cv=folds).mean()),
    }


def sharing_of(title: str, adapted: AdapterModel, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how an arm's tasks share its adapter.

    Args:
        title: of the arm.
        adapted: as trained.
        history: rows of its training.

    Returns:
        ``cosine``: two tasks, joined by ``|``, → the cosine between their gradients, mean over the rows that have one;
        ``mixing``: task → weight of each up-projection, mean over the layers, empty where the method mixes none.
    """
    cosines: dict[str, list[float]] = {}
    for row in history:
        for pair, cosine in row.get("gradient_cosine", {}).items():
            cosines.setdefault("|".join(sorted(pair.split("|"))), []).append(cosine)
    mixing = {}
    if adapted.method == "mtl_lora":
        mean_TN = torch.stack([weights.float() for weights in mixing_weights(adapted).values()]).mean(0)
        mixing = dict(zip(adapted.task_names, mean_TN.tolist(), strict=True))
    return {"title": title, "mixing": mixing, "cosine": {pair: statistics.fmean(of) for pair, of in cosines.items()}}


def latency(
    job: TrainingJob, methods: dict[str, AdapterConfig], samples: Sequence[Sample], batch_sizes: Sequence[int]
) -> dict[str, Any]:
    """Return, by batch size, each method's time to answer over the base's; all take turns, the median counts.

    Args:
        job: names base and tasks.
        methods: title → adapter; each is timed on mixed tasks, and merged into the base for the first task.
        samples: at least as many as the largest batch; those of the first task are taken where one is merged.
        batch_sizes: samples answered at once.
    """
    encoder = sample_encoder(job.base, job.tasks)
    names = [task.name for task in job.tasks]
    one = [sample for sample in samples if sample.task == names[0]]
    base = copy.deepcopy(loaded_base(job.base))
    timed: dict[str, tuple[Scorer, Sequence[Sample]]] = {
        "base": (Scorer(untrained_scorer(base, job.tasks), encoder), samples)
    }
    for title, config in methods.items():
        for is_merged in (False, True) if config.method != "dora" else (False,):
            own = copy.deepcopy(loaded_base(job.base))
            adapted = build_adapter(config, own, names, classes_of_heads(own, job.tasks)).eval()
            if is_merged:
                adapted.merge(names[0])
            scorer = Scorer(class_scorer(adapted), encoder)
            timed[f"{title}, merged" if is_merged else title] = (scorer, one if is_merged else samples)
    ratios: dict[str, list[float]] = {title: [] for title in timed}
    for size in batch_sizes:
        asked = {title: [given[i % len(given)] for i in range(size)] for title, (_, given) in timed.items()}
        asked |= {"base": asked[next(title for title in timed if title != "base")]}
        calls = {title: _call(scorer, asked[title]) for title, (scorer, _) in timed.items()}
        times = _in_turn(calls)
        for title, seconds in times.items():
            ratios[title].append(round(seconds / times["base"], 3))
    return {"batch_sizes": list(batch_sizes), "ratios": ratios}


def _call(scorer: Scorer, samples: Sequence[Sample]) -> Callable[[], object]:
    return lambda: scorer.probabilities(samples)


def _in_turn(calls: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:  # the first round warms up
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}
