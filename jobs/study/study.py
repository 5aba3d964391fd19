"""The verb ``study``: a plan of its cost, the runs, then table and page; after a kill the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.study.records import write_records
from jobs.study.trials import UNTRAINED, SuiteRuns
from jobs.study.work import Row, Work
from jobs.study_config import StudyConfig
from pipeline.contracts import write_atomic
from pipeline.json_text import parse_json
from pipeline.progress import Track, say
from pipeline.tracking import PARENT, Tracker, git_commit

ROW, TRACKED = "row.json", "mlflow.txt"
"""In a run's folder: what it reached, and its MLflow run once that is recorded."""


def study(
    config: StudyConfig, dry_run: bool = False, only_results: bool = False, figures: bool = False
) -> dict[str, Any]:
    """Run what is left of a study and write its table, figures and page.

    Args:
        config: of the study.
        dry_run: only prepare the data and say what is left to do and how long it takes.
        only_results: write table and page of the runs that are over.
        figures: draw the first suite's features and latency first, as far as its arms are searched.

    Returns:
        Where table, page and results are; of a dry run what is left and how long it takes.

    Raises:
        InputError: the study or a run's configuration breaks a rule, or data is missing.
    """
    suites = [SuiteRuns(config, name) for name in config.suites]
    for suite in suites:
        _check(suite)
    for suite in suites:
        _prepare(suite)
    work = [Work(suite) for suite in suites]
    if figures:
        from jobs.study.figures import write_figures

        write_figures(config, work[0])
    if only_results or figures:
        return _results(config, work)[0]
    cost = _cost(work)
    say(
        f"{config.name}: {cost['left']} of about {cost['runs']} runs are left, {cost['minutes']:.0f} min of one process"
    )
    if dry_run:
        return cost
    parent = _parent(config)
    for path in sorted(config.folder.glob(f"rows/**/{ROW}")):  # of a process that was killed right after it
        if not (path.parent / TRACKED).is_file():
            _track(config, parent, path.parent, parse_json(path.read_text()))
    with Track("study", cost["left"], "runs") as track:
        for part in work:
            _run(part, config, parent, track)
    found, files = _results(config, work)
    for path in files:
        parent.log_artifact(path)
    parent.end()
    return found


def _results(config: StudyConfig, work: Sequence[Work]) -> tuple[dict[str, str], list[Path]]:
    from jobs.study.results import write_results

    found = write_results(config, {part.suite.name: part.finished() for part in work})
    return {key: str(found[key]) for key in ("table", "page", "results")}, found["files"]


def _check(suite: SuiteRuns) -> None:
    """Refuse what is wrong with any arm before anything is prepared."""
    from jobs.stages.check import check

    for arm in suite.study.arms_of(suite.name):
        check(suite.config(arm, suite.study.learning_rates[0], 0))


def _prepare(suite: SuiteRuns) -> None:
    from pipeline.ingestion import prepare

    config = suite.config(UNTRAINED, suite.study.learning_rates[0], 0)
    write_records(suite.study, suite.name, config.tasks, suite.folder / "records")
    prepare(config.data, config.tasks, suite.manifest.parent, seed=0)


def _cost(work: Sequence[Work]) -> dict[str, Any]:
    """Say what is left: by what runs took so far, else by a calibration of the suite."""
    runs = left = 0
    seconds = 0.0
    for part in work:
        here, of = part.left()
        runs, left = runs + of, left + here
        if here:
            seconds += here * (part.seconds() or _calibrated(part.suite))
    return {"runs": runs, "left": left, "minutes": seconds / 60}


def _calibrated(suite: SuiteRuns) -> float:
    """Return the seconds of a run, estimated from a few micro-batches; scoring is a third of what training takes."""
    from jobs.main_job import run_stage
    from jobs.run import Run

    arm = next(iter(suite.study.arms_of(suite.name)))
    plain = suite.config(arm, suite.study.learning_rates[0], 0)
    config = plain.model_copy(update={"tasks": suite.config(UNTRAINED, 1e-3, 0).tasks})
    found = run_stage(Run(config), "plan", calibrate=True, in_process=suite.study.workers == 1)
    samples = config.training.num_samples(found.epoch.samples)
    scored = sum(found.test_samples.values())
    return float(found.training.seconds * (1 + scored / (3 * samples)))


def _parent(config: StudyConfig) -> Tracker:
    """Return the study's MLflow run, which a killed one has opened already."""
    path = config.folder / "mlflow.json"
    known = parse_json(path.read_text()) if path.is_file() else {}
    if known.get("mlflow_uri") == config.tracking.shown:
        return Tracker(config.tracking.uri, known["mlflow_run_id"])
    told = config.model_dump(mode="json") | {"tracking": {"uri": config.tracking.shown}}
    tags = {"git_commit": git_commit()}
    tracker = Tracker.start(
        config.tracking, config.name, told, tags, (config.run_root / "mlartifacts").resolve().as_uri()
    )
    write_atomic(path, json.dumps({"mlflow_uri": config.tracking.shown, "mlflow_run_id": tracker.run_id}) + "\n")
    return tracker


def _run(work: Work, config: StudyConfig, parent: Tracker, track: Track) -> None:
    """Run a suite to its end; what each run shows decides what comes next."""
    from pipeline.orchestration.study import run_trials

    expected = work.left()[0]
    while trials := work.pending():
        for trial, row in run_trials(trials, config.workers, config.gpus, config.ray):
            _track(config, parent, trial.folder, row)
            expected -= 1
            track.total += max(0, -expected)  # a grid has grown
            expected = max(0, expected)
            rate = "" if row["rate"] is None else f" at {row['rate']:g}"
            track.advance(1, f"{row['suite']}: {row['arm']}{rate}, seed {row['seed']}: {row['macro']:.3f}")


def _track(config: StudyConfig, parent: Tracker, folder: Path, row: Row) -> None:
    """Record a run as a child of the study's in MLflow."""
    name = "-".join(str(row[key]) for key in ("suite", "arm", "split", "rate", "seed"))
    told = {key: row[key] for key in ("suite", "arm", "rate", "seed", "split", "adapter_parameters")}
    tags = {PARENT: parent.run_id, "suite": row["suite"], "arm": row["arm"]}
    tracker = Tracker.start(config.tracking, name, told, tags, (config.run_root / "mlartifacts").resolve().as_uri())
    values = {f"{row['split']}/{task}": found["value"] for task, found in row["tasks"].items()}
    tracker.log_metrics(values | {f"{row['split']}/macro": row["macro"], "train_s": row["train_s"]}, 0)
    tracker.end()
    write_atomic(folder / TRACKED, tracker.run_id + "\n")
