"""Trials side by side under Ray Tune: each trains in one process, those that fall behind are ended early.

Every trial has a run folder with checkpoints, and the folders alone say where a search is: after a kill all trials are
begun anew, report what they have measured, those that are over first, and go on from there. Tune's own state is never
restored: its parts are written one after the other every few seconds, and a kill between two of them loses trials.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.json_text import parse_json
from pipeline.orchestration.environment import inside_job  # noqa: F401 - sets what Ray reads before it is imported

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from pipeline.contracts import write_atomic
from pipeline.errors import InputError
from pipeline.tracking import Tracker, read_history
from pipeline.training.callbacks import CHECKPOINTS, HISTORY, RunCallbacks
from pipeline.world import World

if TYPE_CHECKING:
    from pipeline.training.loop import TrainingJob

ENDED = "trial.json"
"""In a trial's folder: how it ended."""
JUDGED = "judged_step"
"""The step at which a measurement is held against those of other trials."""


@dataclass(frozen=True)
class Trial:
    """One trial.

    Args:
        job: what it trains.
        folder: its run folder, on storage that all nodes share.
        tracker: its MLflow run.
        steps: it has at most.
    """

    job: TrainingJob
    folder: Path
    tracker: Tracker
    steps: int


def ended(folder: Path) -> dict[str, str] | None:
    """Return a trial's ``state`` and ``reason``; None where it is not over."""
    path = folder / ENDED
    return parse_json(path.read_text()) if path.is_file() else None


def run_trials(
    trials: Sequence[Trial],
    state: Path,
    metric: str,
    grace_and_reduction: tuple[int, int] | None,
    max_concurrent: int | None,
    told: Callable[[int, int | None], None],
) -> None:
    """Run all trials that are not over; each leaves its history and :data:`ENDED`.

    Args:
        trials: numbered by their place.
        state: folder for Tune's own use, emptied first.
        metric: of the history's ``validation``, the higher the better.
        grace_and_reduction: of successive halving, steps and factor; None: no trial is ended early.
        max_concurrent: most at a time; None: as many as there are CPUs or GPUs.
        told: hears a trial's number and the step that it has measured; None when it is over.
    """
    resource = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
    pickled = [ray.cloudpickle.dumps(trial) for trial in trials]

    def function(values: dict[str, Any]) -> None:
        _run_trial(pickled[values["trial"]], metric)

    trainable = tune.with_resources(function, {"CPU": 1, **({"GPU": 1} if resource == "GPU" else {})})
    longest = max(trial.steps for trial in trials)
    if grace_and_reduction is None:
        scheduler: Any = FIFOScheduler()
    else:
        grace, reduction = grace_and_reduction
        scheduler = ASHAScheduler(
            time_attr=JUDGED,
            metric=metric,
            mode="max",
            max_t=max(longest, grace) + 1,  # a trial's last step ends it, not the scheduler
            grace_period=grace,
            reduction_factor=reduction,
        )
    shutil.rmtree(state, ignore_errors=True)
    over_first = sorted(range(len(trials)), key=lambda number: ended(trials[number].folder) is None)
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(over_first)},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=max_concurrent,
            reuse_actors=True,  # a process has its imports and its process group once for all trials that it runs
        ),
        run_config=tune.RunConfig(
            storage_path=str(state.resolve()),
            callbacks=[_Told([trial.folder for trial in trials], told)],
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )
    results = tuner.fit()
    for place, number in enumerate(over_first):  # results have the order of the grid
        folder, error = trials[number].folder, results[place].error
        if ended(folder) is None:
            _end(folder, "failed", str(error or "it ended without a word").strip().splitlines()[-1])


def _end(folder: Path, state: str, reason: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / ENDED, json.dumps({"state": state, "reason": reason}) + "\n")


class _Told(tune.Callback):
    """Carries what Tune hears of the trials to the search's progress, and notes how each ended."""

    def __init__(self, folders: Sequence[Path], told: Callable[[int, int | None], None]) -> None:
        self.folders, self.told = folders, told

    def __getstate__(self) -> dict[str, Any]:
        return {"folders": self.folders}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "step" in result:
            self.told(trial.config["trial"], result["step"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        folder = self.folders[trial.config["trial"]]
        if ended(folder) is None:
            _end(folder, "stopped")
        self.told(trial.config["trial"], None)


class _TrialCallbacks(RunCallbacks):
    """A rank's surroundings, which also report each measurement to Tune."""

    def __init__(self, trial: Trial, metric: str) -> None:
        super().__init__(trial.folder, World(0, 1), trial.job.training.hang_timeout_s, trial.tracker)
        self.metric, self.steps = metric, trial.steps

    def log(self, row: dict[str, Any]) -> None:
        super().log(row)
        if "validation" in row:
            _report(row, self.metric, self.steps)


def _run_trial(pickled: bytes, metric: str) -> None:
    # A trial that is ended early leaves its process once its rows are sent; by default the next one fails after 2 s.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "120")
    trial: Trial = pickle.loads(pickled)
    _repeat(trial, metric)
    if ended(trial.folder) is not None:
        return None
    from pipeline.training.engine import be_the_only_rank
    from pipeline.training.loop import Trainer

    be_the_only_rank()
    try:
        with _TrialCallbacks(trial, metric) as callbacks:
            Trainer(trial.job, World(0, 1), callbacks, trial.folder / CHECKPOINTS).run()
    except InputError as error:
        return _end(trial.folder, "failed", str(error))
    _end(trial.folder, "finished")
    return None


def _repeat(trial: Trial, metric: str) -> None:
    """Report what a trial has measured in earlier calls: others are judged by it."""
    for row in read_history(trial.folder / HISTORY):
        if "validation" in row:
            _report(row, metric, trial.steps)


def _report(row: Mapping[str, Any], metric: str, steps: int) -> None:
    # A trial's last step ends it: where a rung stands there too, the trial does not come to it.
    judged = row["step"] - 0.5 if row["step"] == steps else row["step"]
    tune.report({"step": row["step"], JUDGED: judged, metric: row["validation"][metric]})
