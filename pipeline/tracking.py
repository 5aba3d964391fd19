"""The one door to MLflow tracking: one run a job, written by the driver and by rank 0.

The embedded default is sqlite beside the runs; a server is named by ``tracking.uri`` or ``MLFLOW_TRACKING_URI``.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


class TrackingConfig(BaseModel):
    """Where runs and models are recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str = ""
    """MLflow tracking URI; empty: ``MLFLOW_TRACKING_URI``, else sqlite in the run root."""
    experiment: str = "mtl-lora"

    def resolved(self, run_root: Path) -> TrackingConfig:
        """Return the configuration with its URI filled in."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_root.resolve()}/mlflow.db"
        return self.model_copy(update={"uri": uri})


class Tracker:
    """One MLflow run; plain values only, so it travels to a worker and connects there.

    Args:
        uri: tracking URI.
        run_id: the run that is written to.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id

    def __reduce__(self) -> tuple[Any, ...]:
        return Tracker, (self.uri, self.run_id)

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    @classmethod
    def start(
        cls, config: TrackingConfig, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str], artifacts: Path
    ) -> Tracker:
        """Open a run in the experiment, which is made where it is missing.

        Args:
            config: resolved tracking configuration.
            name: run name.
            parameters: logged flat, keys joined by dots.
            tags: logged as they are.
            artifacts: folder for artifacts of an experiment that is new in a local store.
        """
        from mlflow import MlflowClient

        client = MlflowClient(config.uri)
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            local = config.uri.startswith("sqlite:")
            location = artifacts.resolve().as_uri() if local else None
            experiment_id = client.create_experiment(config.experiment, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        run = client.create_run(experiment_id, run_name=name, tags=dict(tags))
        tracker = cls(config.uri, run.info.run_id)
        tracker.log_parameters(parameters)
        return tracker

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log nested parameters, keys joined by dots, values cut to what MLflow stores."""
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:6000]) for key, value in _flatten(parameters).items()]
        for first in range(0, len(flat), 100):
            self._client.log_batch(self.run_id, params=flat[first : first + 100])

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Log numbers of one step in one call; those that are None or not finite are left out."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(k, float(v), now, step) for k, v in metrics.items() if v is not None and abs(v) < float("inf")]
        if rows:
            self._client.log_batch(self.run_id, metrics=rows)

    def log_artifact(self, path: Path) -> None:
        """Store one file with the run."""
        self._client.log_artifact(self.run_id, str(path))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def end(self, status: str = "FINISHED") -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def git_commit() -> str:
    """Return the commit of the code that runs, ``unknown`` outside a repository."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"
