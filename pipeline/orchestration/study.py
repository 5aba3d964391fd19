"""The runs of a comparison, one after the other in this process or side by side as Ray tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.orchestration.config import RayConfig

if TYPE_CHECKING:
    from pipeline.study.trial import StudyTrial


def run_trials(
    trials: Sequence[StudyTrial], workers: int, gpus: int, config: RayConfig
) -> Iterator[tuple[StudyTrial, dict[str, Any]]]:
    """Yield each run with its row as it ends; a run writes its row itself, so that one that is over stays so.

    Args:
        trials: to run.
        workers: runs at a time; one is this process itself, which then keeps its base loaded.
        gpus: that each has, under Ray.
        config: of the cluster, with several workers.

    Raises:
        InputError: a run breaks a rule.
    """
    from pipeline.study.trial import run_trial

    if workers == 1:
        for trial in trials:
            yield trial, run_trial(trial)
        return
    import ray

    from pipeline.orchestration.cluster import cluster

    with cluster(config):
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2)(run_trial)
        waiting, running = list(trials), dict[Any, StudyTrial]()
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    trial = waiting.pop(0)
                    running[task.remote(trial)] = trial
                done, _ = ray.wait(list(running), num_returns=1)
                for reference in done:
                    yield running.pop(reference), _row(reference)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _row(reference: Any) -> dict[str, Any]:
    import ray

    try:
        row: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    return row
