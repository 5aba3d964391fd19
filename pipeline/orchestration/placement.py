"""Where a run's ranks are put: what each asks of the cluster, and whether the cluster can ever give it."""

from __future__ import annotations

from collections.abc import Mapping

from ray.train import ScalingConfig

from pipeline.errors import InputError, did_you_mean
from pipeline.training.config import TrainingConfig

_ACCELERATOR = "accelerator_type:"
"""What Ray's nodes name their accelerators by, among their resources."""


def scaling(config: TrainingConfig, cluster: Mapping[str, float]) -> ScalingConfig:
    """Return what Ray Train is asked for.

    Args:
        config: the run's training.
        cluster: resource → how much of it all nodes have together, as ``ray.cluster_resources`` says.

    Raises:
        InputError: the cluster has too little of a resource for the ranks, or none of such accelerators.
    """
    asked = {"CPU": 1.0, "GPU": float(cluster.get("GPU", 0) >= 1)} | config.resources_per_worker
    asked = {name: amount for name, amount in asked.items() if amount}
    least = config.min_workers or config.num_workers
    key = f"training.{'min' if config.min_workers else 'num'}_workers"
    for name, amount in asked.items():
        have = cluster.get(name, 0)
        if have < amount * least:
            each = "" if amount == 1 else f", of which each takes {amount:g}"
            raise InputError(
                f"{key} must be at most what the cluster's {have:g} {_words(name)}{each} suffice for, "
                f"{int(have // amount)}, got {least}; lower it, ask for less in training.resources_per_worker or add "
                "a node"
            )
    if config.accelerator_type is not None and _ACCELERATOR + config.accelerator_type not in cluster:
        known = sorted(name.removeprefix(_ACCELERATOR) for name in cluster if name.startswith(_ACCELERATOR))
        raise InputError(
            f"training.accelerator_type must be one that the cluster has, got {config.accelerator_type!r}"
            f"{did_you_mean(config.accelerator_type, known) if known else '; it has none: leave it out'}"
        )
    return ScalingConfig(
        num_workers=(least, config.num_workers) if config.min_workers else config.num_workers,  # type: ignore[arg-type]
        use_gpu="GPU" in asked,
        resources_per_worker=asked,
        placement_strategy=config.placement_strategy,
        accelerator_type=config.accelerator_type,
    )


def _words(resource: str) -> str:
    return {"CPU": "CPUs", "GPU": "GPUs", "memory": "bytes of memory"}.get(resource, f"of {resource!r}")
