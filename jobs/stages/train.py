"""Plan → trained adapter, on Ray workers."""

from __future__ import annotations

import shutil
from pathlib import Path

from jobs.run import Run
from jobs.stages.plan import RunPlan, training_job
from jobs.tables import show_sizes
from pipeline.orchestration import training
from pipeline.orchestration.cluster import cluster
from pipeline.progress import say
from pipeline.stream import merge_ledgers
from pipeline.tracking import send_history


def train(run: Run, plan: RunPlan) -> Path:
    """Train the adapter; a finished training of the same configuration stands.

    Args:
        run: that is trained.
        plan: what it will take; what does not fit is said.

    Returns:
        The folder of the adapter, from which a predictor is loaded.

    Raises:
        InputError: the run's folder was trained with another configuration, or holds another adapter's checkpoints.
    """
    from pipeline.modeling.predictor import PREDICTOR_FILE
    from pipeline.training.checkpoint import Checkpoints

    config, folder = run.config, run.folder
    folder.bind(config.digest())
    if plan.adapter is not None:
        show_sizes(plan.adapter)
    for misfit in plan.training.misfits:
        say(f"WARNING: {misfit}")
    if (folder.adapter / PREDICTOR_FILE).is_file():
        say(f"{folder.adapter} is trained with this configuration; remove {folder.path} to train anew")
        return folder.adapter
    job = training_job(config)
    checkpoints = Checkpoints(folder.checkpoints, job.adapter_sha256)
    checkpoints.refuse_foreign()
    tracker = run.tracker()
    run.keep()
    warm_start = None if job.training.warm_start is None else run.shared(job.training.warm_start)
    try:
        with cluster(config.ray):
            checkpoint = training.train(job, folder.path, tracker, run.mirror, warm_start)
        if config.training.validation is not None:
            checkpoint = checkpoints.best() or checkpoint
    except BaseException as error:
        tracker.end_if_reachable("KILLED" if isinstance(error, SystemExit) else "FAILED")
        raise
    send_history(tracker, folder.history)
    if config.training.ledger:
        merge_ledgers(folder.path)
    _keep_adapter(run, checkpoint)
    return folder.adapter


def standing(run: Run) -> Path:
    """Return the folder of the adapter that was trained.

    Raises:
        InputError: none was.
    """
    from pipeline.modeling.predictor import PREDICTOR_FILE

    run.folder.needs(run.folder.adapter / PREDICTOR_FILE, "train")
    return run.folder.adapter


def _keep_adapter(run: Run, checkpoint: Path) -> None:
    """Copy the checkpoint's adapter into the run's folder, whole or not at all, with what it takes to answer."""
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec

    adapter = run.folder.adapter
    staged = adapter.with_name(f".{adapter.name}")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(checkpoint / adapter.name, staged)
    PredictorSpec(tasks=run.config.tasks, base=run.config.model, reading=run.config.data.reading()).write(
        staged / PREDICTOR_FILE
    )
    shutil.rmtree(adapter, ignore_errors=True)
    staged.rename(adapter)
