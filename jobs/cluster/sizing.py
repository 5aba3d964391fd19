"""What the containers of a cluster must have, by a run's plan: memory, CPUs, disk and time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jobs.config import RunConfig
from pipeline.training.plan import TrainingPlan

_GIB = 2**30
_PROCESS_BYTES = 2 * _GIB
"""Of Ray's own processes on a node, and of a Python with torch, DeepSpeed and MLflow imported."""
_SPARE = 1.25
"""Over what was planned: a container that needs more is killed."""
_SHARDS_BYTES, _KEPT_RUNS = 20 * _GIB, 8
"""Of a run's folder beside the checkpoints, cautiously; and how many runs the volume holds."""
_LEAST_DEADLINE_S = 4 * 3600


@dataclass(frozen=True)
class Sizing:
    """What a cluster is made of.

    Args:
        workers: nodes with one rank each.
        cpus: of each.
        worker_bytes: memory of each, where the base computes on its CPUs.
        gpu_worker_bytes: the same, where it computes on a GPU.
        head_bytes: memory of the head. Its driver loads no base, but has room for one: files that it registers count
            as its memory until they are written.
        object_store_bytes: of each node, inside its memory.
        volume_bytes: of the folder of runs.
        shares_volume: whether it is one for all nodes; of runs in a bucket each container has working copies alone.
        deadline_s: after which a run is taken for hung.
    """

    workers: int
    cpus: int
    worker_bytes: int
    gpu_worker_bytes: int
    head_bytes: int
    object_store_bytes: int
    volume_bytes: int
    shares_volume: bool
    deadline_s: int


def sizing(config: RunConfig, planned: TrainingPlan) -> Sizing:
    """Return what a run needs of a cluster.

    Args:
        config: of the run.
        planned: what ``mtl-lora plan`` says of the same.
    """
    training = config.training
    base = planned.parameters * 4  # in fp32, the widest that is computed in
    store = config.ray.object_store_mb * 2**20
    scorers = math.ceil(config.evaluation.num_workers / training.num_workers) * (base + _PROCESS_BYTES)
    compared = 2 * base + _PROCESS_BYTES  # a model and its exports; files and weights on their way to a device
    return Sizing(
        workers=training.num_workers,
        cpus=max(4, math.ceil(training.resources_per_worker.get("CPU", 1))),
        worker_bytes=_rounded(max(planned.rank_bytes, compared, scorers) * _SPARE + store + _PROCESS_BYTES),
        gpu_worker_bytes=_rounded(max(compared, scorers) * _SPARE + store + _PROCESS_BYTES),
        head_bytes=_rounded((base + _PROCESS_BYTES) * _SPARE + store + _PROCESS_BYTES),
        object_store_bytes=store,
        volume_bytes=_rounded((planned.kept_bytes + _SHARDS_BYTES) * _KEPT_RUNS),
        shares_volume=config.store_root is None,
        deadline_s=max(_LEAST_DEADLINE_S, math.ceil(3 * (planned.seconds + planned.validation_seconds) / 3600) * 3600),
    )


def _rounded(count: float) -> int:
    return math.ceil(count / _GIB) * _GIB
