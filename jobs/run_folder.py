"""What a run's folder remembers: whose it is, its MLflow run, its history."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.config import RunConfig
from pipeline.contracts import write_atomic
from pipeline.errors import InputError
from pipeline.stream import manifest_sha256
from pipeline.tracking import Tracker, git_commit, read_history

ADAPTER, EXPORT, PLAN, DECISION, RUN = "adapter", "export", "plan.json", "decision.json", "run.json"
DRIFT = "drift.json"


def needs(path: Path, verb: str) -> None:
    """Refuse to go on without a file that an earlier verb writes.

    Raises:
        InputError: it is not there.
    """
    if not path.is_file():
        raise InputError(f"this verb needs {path}, which is not there; run first: mtl-lora {verb} with this --config")


def check_claim(config: RunConfig) -> None:
    """Refuse a folder that another configuration has claimed.

    Raises:
        InputError: it has.
    """
    mark = config.folder / RUN
    if mark.is_file() and json.loads(mark.read_text()).get("config_sha256") != config.digest():
        raise InputError(
            f"a run's folder must hold one configuration, {config.folder} was trained with another; "
            f"choose another name=… or remove the folder"
        )


def claim(config: RunConfig) -> None:
    """Claim the run's folder for this configuration.

    Raises:
        InputError: another configuration has.
    """
    check_claim(config)
    mark = config.folder / RUN
    if not mark.is_file():
        write_atomic(mark, json.dumps({"schema": 1, "config_sha256": config.digest()}) + "\n")


def tracker_of(config: RunConfig) -> Tracker:
    """Return the MLflow run of this folder, opening it the first time."""
    mark = config.folder / RUN
    known: dict[str, Any] = {"schema": 1, "config_sha256": config.digest()}
    if mark.is_file():
        known = json.loads(mark.read_text())
    if known.get("mlflow_uri") == config.tracking.shown:
        return Tracker(config.tracking.uri, known["mlflow_run_id"])
    tags = {"git_commit": git_commit(), "manifest_sha256": manifest_sha256(config.manifest_path)}
    parameters = config.shown()
    del parameters["tasks"]
    parameters["tasks"] = ", ".join(task.name for task in config.tasks)
    tracker = Tracker.start(config.tracking, config.name, parameters, tags, config.run_root / "mlartifacts")
    known |= {"mlflow_uri": config.tracking.shown, "mlflow_run_id": tracker.run_id}
    write_atomic(mark, json.dumps(known) + "\n")
    return tracker


def history(config: RunConfig) -> list[dict[str, Any]]:
    """Return the rows of the training history."""
    return read_history(config.folder / "history.jsonl")


def last_step(config: RunConfig) -> int:
    """Return the last step of the training history, 0 without one."""
    rows = history(config)
    return int(rows[-1]["step"]) if rows else 0
