"""The owner of a run's folder: the one place that knows what its files are called and whose they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.contracts import Contract, EvaluationReport, PromotionDecision, write_atomic
from pipeline.errors import InputError
from pipeline.ingestion.drift import DriftReport
from pipeline.json_text import parse_json

C = TypeVar("C", bound=Contract)


@dataclass(frozen=True)
class RunFile(Generic[C]):
    """A file of a run that holds one artefact.

    Args:
        name: in the run's folder.
        contract: what it holds.
        verb: the command that writes it.
    """

    name: str
    contract: type[C]
    verb: str


EVALUATION = RunFile("evaluation.json", EvaluationReport, "evaluate")
BASE_EVALUATION = RunFile("evaluation_base.json", EvaluationReport, "evaluate")
DECISION = RunFile("decision.json", PromotionDecision, "promote")
DRIFT = RunFile("drift.json", DriftReport, "prepare")


@dataclass(frozen=True)
class ScoreFiles:
    """What the evaluation of one model on the run's samples leaves: its scores, their report, hidden states."""

    scores: Path
    report: Path
    features: Path


class RunFolder:
    """A run's folder.

    Args:
        path: of the folder, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        """The resolved configuration."""
        self.shards = path / "shards"
        """Shards of the run's own making."""
        self.manifest = self.shards / "manifest.json"
        self.plan = path / "plan.json"
        self.checkpoints = path / "checkpoints"
        self.history = path / "history.jsonl"
        """The training log, a row a logged step."""
        self.adapter = path / "adapter"
        """The trained adapter: what a predictor is loaded from."""
        self.exports = path / "export"
        """A folder a task, each a plain PEFT LoRA, and how to serve them."""
        self.page = path / "report.html"
        self.job_log = path / "job.log"
        """Every line of the last job on this folder that somebody waited for, those of libraries too."""
        self.result = path / "result.json"
        """Written last: the retraining that made this run is finished."""
        self._binding = path / "run.json"

    def read(self, file: RunFile[C]) -> C:
        """Return an artefact.

        Raises:
            InputError: it is not there, which names the verb that writes it, or breaks its contract.
        """
        self.needs(self.path / file.name, file.verb)
        return file.contract.read(self.path / file.name)

    def find(self, file: RunFile[C]) -> C | None:
        """Return an artefact, None where it does not stand.

        Raises:
            InputError: it breaks its contract.
        """
        path = self.path / file.name
        return file.contract.read(path) if path.is_file() else None

    def write(self, file: RunFile[C], artefact: C) -> None:
        """Write an artefact, whole or not at all."""
        artefact.write(self.path / file.name)

    def remove(self, file: RunFile[Any]) -> None:
        """Delete an artefact that no longer holds."""
        (self.path / file.name).unlink(missing_ok=True)

    def needs(self, path: Path, verb: str) -> None:
        """Refuse to go on without a file that an earlier verb writes.

        Raises:
            InputError: it is not there.
        """
        if not path.is_file():
            raise InputError(
                f"this verb needs {path}, which is not there; run first: mtl-lora {verb} with this --config"
            )

    def export(self, task: str) -> Path:
        """Return where a task is exported."""
        return self.exports / task

    def scores(self, slot: str) -> ScoreFiles:
        """Return the files of one model's evaluation; the slot of the run's own adapter is empty."""
        end = f"_{slot}" if slot else ""
        return ScoreFiles(
            self.path / f"scores{end}.parquet",
            self.path / f"evaluation{end}.json",
            self.path / f"features{end}.safetensors",
        )

    def check_configuration(self, digest: str) -> None:
        """Refuse a folder that was trained with another configuration.

        Args:
            digest: of what decides the trained adapter.

        Raises:
            InputError: it was.
        """
        if self.binding.get("config_sha256", digest) != digest:
            raise InputError(
                f"a run's folder must hold one configuration, {self.path} was trained with another; "
                f"choose another name=… or remove the folder"
            )

    def bind(self, digest: str) -> None:
        """Bind the folder to a configuration.

        Raises:
            InputError: it is bound to another one.
        """
        self.check_configuration(digest)
        self.note(digest)

    def note(self, digest: str, **more: str) -> None:
        """Note what belongs to the folder for good, its MLflow run; and its configuration, where none is noted yet."""
        known = self.binding
        wanted = {"schema": 1, "config_sha256": digest} | known | more
        if wanted != known:
            write_atomic(self._binding, json.dumps(wanted) + "\n")

    @property
    def binding(self) -> dict[str, Any]:
        """What the folder is bound to: ``config_sha256``, ``mlflow_uri`` and ``mlflow_run_id``; empty at first.

        Raises:
            InputError: the file that says it is damaged.
        """
        if not self._binding.is_file():
            return {}
        try:
            return dict(parse_json(self._binding.read_bytes()))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{self._binding} must say what the folder is bound to, as JSON, it does not: {error}; choose another "
                "name=… or remove the folder"
            ) from error
