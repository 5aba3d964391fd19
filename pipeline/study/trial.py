"""One run of a comparison: an adapter trained as everywhere else and scored, on a base that stays loaded.

A process that runs many of them loads the frozen base once; each run works on a copy of it, so that none sees what
another has left.
"""

from __future__ import annotations

import copy
import gc
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mtl_lora import AdapterModel
from pipeline.contracts import Sample, write_atomic
from pipeline.evaluation.intervals import plain_value
from pipeline.evaluation.metrics import statistics
from pipeline.evaluation.predict import predict
from pipeline.evaluation.score_table import by_task, write_scores
from pipeline.evaluation.summary import metric_of
from pipeline.json_text import parse_json
from pipeline.modeling.answering import class_scorer, sample_encoder, untrained_scorer
from pipeline.modeling.encoding import SampleEncoder
from pipeline.modeling.head_encoding import HeadEncoder
from pipeline.modeling.scoring import Scorer
from pipeline.stream import read_split
from pipeline.study.frozen_part import KeptRows, without_frozen_part
from pipeline.study.loaded import loaded_base
from pipeline.training.engine import be_the_only_rank
from pipeline.training.loop import Trainer, TrainingJob
from pipeline.world import World

ROW, SCORES = "row.json", "scores.parquet"
"""In a run's folder: what it reached, written last, and the scores of its samples."""


@dataclass(frozen=True)
class StudyTrial:
    """One run.

    Args:
        job: what is trained.
        split: that is scored.
        folder: of its files.
        labels: what tells it from the others (suite, arm, rate, seed, …); part of its row.
        shares_heads: an encoder's tasks with the same classes answer by one head.
        is_trained: False scores the base alone.
        frozen_layers: lower layers without an adapter, whose states are computed once for all runs.
    """

    job: TrainingJob
    split: str
    folder: Path
    labels: Mapping[str, Any] = field(default_factory=dict)
    shares_heads: bool = False
    is_trained: bool = True
    frozen_layers: int = 0


def read_row(folder: Path) -> dict[str, Any] | None:
    """Return what a run has reached; None where it is not over."""
    path = folder / ROW
    return parse_json(path.read_text()) if path.is_file() else None


def run_trial(trial: StudyTrial) -> dict[str, Any]:
    """Train and score one run, write its scores and then its row; a run that is over is not run again.

    Returns:
        The row: the labels; ``macro``, the mean of the tasks' metrics; ``tasks``; sizes; seconds.

    Raises:
        InputError: the job breaks a rule of training or of its data.
    """
    if (found := read_row(trial.folder)) is not None:
        return found
    start = time.perf_counter()
    adapted, encoder, row = trained(trial) if trial.is_trained else _untrained(trial)
    scored = time.perf_counter()
    model = class_scorer(adapted) if trial.is_trained else untrained_scorer(adapted, trial.job.tasks)
    scores = predict(Scorer(model, encoder), read_split(trial.job.manifest_path, trial.split))
    values: dict[str, dict[str, Any]] = {}
    for name, sample in by_task(scores, trial.job.tasks).items():
        metric = metric_of(sample.spec)
        values[name] = {
            "metric": metric,
            "value": plain_value(statistics(sample)[metric], len(sample)),
            "n": len(sample),
        }
    row |= {**trial.labels, "split": trial.split, "tasks": values}
    row["macro"] = sum(found["value"] for found in values.values()) / len(values)
    row |= {
        "train_s": round(scored - start, 2),
        "score_s": round(time.perf_counter() - scored, 2),
    }
    write_scores(trial.folder / SCORES, scores)
    write_atomic(trial.folder / ROW, json.dumps(row) + "\n")
    return row


def trained(trial: StudyTrial) -> tuple[AdapterModel, SampleEncoder, dict[str, Any]]:
    """Train a run's adapter and return it with its encoder, and its steps, last losses and sizes."""
    be_the_only_rank()
    heard = _Heard()
    base, encoder = _base_and_encoder(trial)
    with tempfile.TemporaryDirectory(prefix="study-") as checkpoints:
        trainer = Trainer(trial.job, World(0, 1), heard, Path(checkpoints), base)
        trainer.encoder = encoder
        trainer.run()
    adapted = trainer.adapter
    trainer.engine.close()  # or each run would leave its base behind
    del trainer
    gc.collect()
    return adapted, encoder, {"history": heard.rows, **sizes(adapted)}


def _untrained(trial: StudyTrial) -> tuple[nn.Module, SampleEncoder, dict[str, Any]]:
    base, encoder = _base_and_encoder(trial)
    parameters = sum(p.numel() for p in base.parameters())
    return base, encoder, {"history": [], "adapter_parameters": 0, "head_parameters": 0, "parameters": parameters}


def sizes(adapted: AdapterModel) -> dict[str, int]:
    """Return how many parameters the adapter, the heads and the whole model have."""
    trained, every = adapted.count_parameters()
    heads = 0 if adapted.task_heads is None else sum(p.numel() for p in adapted.task_heads.parameters())
    return {"adapter_parameters": trained - heads, "head_parameters": heads, "parameters": every}


def _base_and_encoder(trial: StudyTrial) -> tuple[nn.Module, SampleEncoder]:
    """Return a base of a run's own, and what makes samples its tokens."""
    job, whole = trial.job, loaded_base(trial.job.base)
    if trial.frozen_layers:
        base, encoder = without_frozen_part(job, whole, trial.frozen_layers, trial.folder.parents[3] / "states")
    else:
        base, encoder = copy.deepcopy(whole), sample_encoder(job.base, job.tasks)
    if trial.shares_heads and isinstance(encoder, (HeadEncoder, KeptRows)):
        encoder.share_heads()
    return base, encoder


class _Heard:
    """The surroundings of a run that nobody stops: its log in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def started(self, step: int, num_steps: int) -> None:
        """Hear the first step."""

    def stops(self) -> bool:
        """Never."""
        return False

    def log(self, row: dict[str, Any]) -> None:
        """Keep what the table and the figures show of a row."""
        kept = ("step", "loss", "gradient_conflict", "gradient_cosine")
        self.rows.append({key: row[key] for key in kept if key in row})

    def trained_on(self, step: int, rank: int, samples: Sequence[Sample]) -> None:
        """No ledger is kept."""
