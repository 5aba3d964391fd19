"""The macro metric on the validation split while a run trains: which checkpoint is best, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.evaluation.intervals import plain_value
from pipeline.evaluation.metrics import reason, statistics
from pipeline.evaluation.score_table import COLUMNS, by_task
from pipeline.evaluation.summary import metric_of
from pipeline.modeling.encoding import SampleEncoder
from pipeline.modeling.packing import micro_batches
from pipeline.stream import CacheConfig, read_split
from pipeline.training.config import ValidationConfig
from pipeline.training.engine import gather, largest
from pipeline.world import World

_TINY = 1e-30


def validation_samples(
    config: ValidationConfig, manifest_path: Path | str, tasks: Sequence[TaskSpec], cache: CacheConfig | None = None
) -> list[Sample]:
    """Return what is scored at each measurement: the first samples of each task.

    Raises:
        InputError: a task has no sample in the split.
    """
    every: list[Sample] = []
    for task in tasks:
        every += islice(read_split(manifest_path, config.split, task.name, cache=cache), config.samples_per_task)
    return every


class Validation:
    """Scores the same samples again and again; all ranks share the work and come to the same numbers.

    Args:
        config: which samples, how often, how patiently.
        manifest_path: of the shards.
        tasks: every one must have samples in the split.
        encoder: tokenises them.
        world: this rank takes its share.
        cache: where shards from afar are kept.

    Raises:
        InputError: a task has no sample in the split.
    """

    def __init__(
        self,
        config: ValidationConfig,
        manifest_path: Path | str,
        tasks: Sequence[TaskSpec],
        encoder: SampleEncoder,
        world: World,
        cache: CacheConfig | None = None,
    ) -> None:
        self.config, self.tasks = config, tasks
        every = validation_samples(config, manifest_path, tasks, cache)
        # Every forward is one of all ranks: each gets as many samples, those at the end once more.
        per_rank = math.ceil(len(every) / world.num_ranks)
        self.samples = [every[(world.rank + i * world.num_ranks) % len(every)] for i in range(per_rank)]
        self.examples = encoder.encode(self.samples)
        self.encoder = encoder
        self.best: float | None = None
        self.best_step = self.waited = 0

    def is_due(self, step: int) -> bool:
        """Whether the metric is to be measured after so many steps."""
        return step % self.config.every_steps == 0

    def measure(self, step: int, forward: Callable[..., Any], where: torch.device, max_tokens: int) -> dict[str, float]:
        """Return each task's metric and their mean, ``macro``; every rank calls it.

        Args:
            step: optimizer steps done; noted where the macro metric is the best so far.
            forward: returns what a scorer does last, of a module in evaluation mode.
            where: device of the module.
            max_tokens: most tokens that go through it at once.

        Raises:
            InputError: a task's metric is undefined on its samples.
        """
        rows: list[tuple[Any, ...]] = []
        parts = micro_batches(self.examples, max_tokens)
        with torch.no_grad():
            for part in micro_batches(self.examples, max_tokens, at_least=largest(len(parts))):
                batch = self.encoder.collate([self.examples[i] for i in part]).to(where)
                *_, scores = forward(batch)
                for i, p in zip(part, batch.answers(scores).cpu().numpy(), strict=True):
                    sample = self.samples[i]
                    probabilities = p[: self.examples[i].num_classes]
                    rows.append((sample.key, sample.task, sample.label, probabilities, sample.group))
        unique = {(row[1], row[0]): row for part in gather(rows) for row in part}
        values = self._values(list(unique.values()))
        values["macro"] = sum(values.values()) / len(values)
        if self.best is None or values["macro"] > self.best:
            self.best, self.best_step, self.waited = values["macro"], step, 0
        else:
            self.waited += 1
        return values

    def _values(self, rows: list[tuple[Any, ...]]) -> dict[str, float]:
        written = [task.name for task in self.tasks if task.is_written]
        values = {name: _likelihood(row for row in rows if row[1] == name) for name in written}
        frame = pd.DataFrame([row for row in rows if row[1] not in values], columns=list(COLUMNS))
        frame["group"] = frame["group"].astype(object)
        for name, scores in by_task(frame, self.tasks).items():
            metric = metric_of(scores.spec)
            values[name] = plain_value(statistics(scores)[metric], len(scores))
            if math.isnan(values[name]):
                raise InputError(
                    f"the {metric} of task {name!r} must be defined on its {len(scores)} samples of split "
                    f"{self.config.split!r}, it is not: {reason(scores, metric)}; raise "
                    "training.validation.samples_per_task"
                )
        return {task.name: values[task.name] for task in self.tasks}

    @property
    def is_over(self) -> bool:
        """Whether the run has waited long enough for a better macro metric."""
        return self.config.patience is not None and self.waited >= self.config.patience

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know of the measurements before."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what an earlier run measured."""
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]


def _likelihood(rows: Iterable[tuple[Any, ...]]) -> float:
    """Return the geometric mean, over samples, of the probability a token of the answers that are to be written: they
    cannot be written while weights may lie partitioned over the ranks."""
    return float(np.exp(np.mean([np.log(max(float(row[3][0]), _TINY)) for row in rows])))
