"""Metrics through Ray's own: each node's agent exports them to Prometheus (``/api/prometheus`` of the dashboard lists
where). What a run tells ends with the run; what is told of models stays with the cluster, in an actor of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import InputError
from pipeline.orchestration.cluster import cluster
from pipeline.orchestration.config import RayConfig
from pipeline.orchestration.metric_names import (
    CHAMPION_SINCE,
    LOSS,
    OF_MODELS,
    OF_TRAINING,
    PROGRESS,
    RESTARTS,
    RETRAININGS,
    SAMPLES,
    STEP,
    STEPS,
    TASK_LOSS,
    TOKENS,
    VERDICTS,
    WAIT,
    MetricName,
)
from pipeline.progress import say

_ACTOR, _NAMESPACE = "mtl-lora-metrics", "mtl-lora"
_TOLD_S = 60.0
_STARTS = ".starts"


def _made(names: tuple[MetricName, ...]) -> dict[MetricName, Any]:
    kinds: dict[str, Any] = {"gauge": Gauge, "counter": Counter}
    return {each: kinds[each.kind](each.name, description=each.description, tag_keys=each.tags) for each in names}


class TrainingMetrics:
    """What rank 0 of a run exports.

    Args:
        run: its name.
        checkpoints: folder of the run, where the starts of its ranks are counted; with a bucket as ``run_root``
            those on this machine.
    """

    def __init__(self, run: str, checkpoints: Path) -> None:
        self._tags, self._metrics = {"run": run}, _made(OF_TRAINING)
        checkpoints.mkdir(parents=True, exist_ok=True)
        with (checkpoints / _STARTS).open("a") as file:
            file.write(".")
            file.flush()
            self._set(RESTARTS, os.fstat(file.fileno()).st_size - 1)

    def _set(self, name: MetricName, value: float, **tags: str) -> None:
        self._metrics[name].set(float(value), tags={**self._tags, **tags})

    def log(self, row: Mapping[str, Any]) -> None:
        """Export one row of the history."""
        for name, key in (
            (STEP, "step"),
            (STEPS, "num_steps"),
            (SAMPLES, "samples"),
            (TOKENS, "tokens_per_s"),
            (LOSS, "loss"),
            (WAIT, "data_wait_share"),
        ):
            self._set(name, row[key])
        for task, loss in row["task_loss"].items():
            self._set(TASK_LOSS, loss, task=task)
        self._set(PROGRESS, time.time())


class _ModelMetrics:
    """Counts on a cluster for as long as it stands: a job's own process would take its numbers with it."""

    def __init__(self) -> None:
        self._metrics = _made(OF_MODELS)

    def add(self, model: str, verdict: str | None, outcome: str | None, champion_since: float | None) -> None:
        if verdict is not None:
            self._metrics[VERDICTS].inc(tags={"model": model, "verdict": verdict})
        if outcome is not None:
            self._metrics[RETRAININGS].inc(tags={"model": model, "outcome": outcome})
        if champion_since is not None:
            self._metrics[CHAMPION_SINCE].set(champion_since, tags={"model": model})


def tell_of_model(
    config: RayConfig,
    model: str,
    *,
    verdict: str | None = None,
    outcome: str | None = None,
    champion_since: float | None = None,
) -> None:
    """Count a verdict or a retraining on the cluster, which outlives this process.

    That the cluster does not take it is said, never an error: what it speaks of is done.

    Args:
        config: which cluster; see :func:`pipeline.orchestration.environment.is_on_lasting_cluster`.
        model: registered model.
        verdict: of the gates.
        outcome: of a retraining, as its notice says it.
        champion_since: seconds since 1970.
    """
    try:
        with cluster(config, log_to_driver=False):
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            made: Any = ray.remote(_ModelMetrics)
            actor = made.options(
                name=_ACTOR,
                namespace=_NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                scheduling_strategy=here,
            )
            told = actor.remote().add.remote(model, verdict, outcome, champion_since)
            ray.get(told, timeout=_TOLD_S)
    except (InputError, ray.exceptions.RayError, ConnectionError) as error:
        say(f"WARNING: the cluster's metrics do not show this of model {model!r}: {type(error).__name__}")
