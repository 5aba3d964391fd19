"""The runs of a study: what each is told, where it stands, and how it is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from jobs.config import RunConfig, in_full, resolved
from jobs.config_errors import explain
from jobs.config_file import read_resolved
from jobs.study_config import StudyConfig, Suite
from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.json_text import parse_json
from pipeline.modeling.adapter_config import AdapterConfig

if TYPE_CHECKING:
    from pipeline.study.trial import StudyTrial

UNTRAINED = "untrained"
"""Name of the arm that is the base alone."""


def load_study(path: Path, overrides: tuple[str, ...] | list[str] = ()) -> StudyConfig:
    """Read a study's file, or a packaged one, overridden; ``suites=[a,b]`` and ``arms=[…]`` take a part of them.

    Raises:
        InputError: the file is missing, a key is unknown, or a value breaks its rule.
    """
    parts = {key: o.partition("=")[2] for o in overrides for key in ("suites", "arms") if o.startswith(f"{key}=[")}
    values = read_resolved(path, [o for o in overrides if not o.startswith(tuple(f"{k}=[" for k in parts))], "study")
    for key, text in parts.items():
        names = yaml.safe_load(text)
        if unknown := [name for name in names if name not in values.get(key, {})]:
            raise InputError(
                f"{key} must name those of the study, got {unknown}; there are {list(values.get(key, {}))}"
            )
        values[key] = {name: values[key][name] for name in values[key] if name in names}
    for key in ("suites", "arms"):  # a name alone stands for one without options
        values[key] = {name: options or {} for name, options in (values.get(key) or {}).items()}
    if "arms" in parts:
        for key in ("reference", "recipes"):
            values[key] = [name for name in values.get(key, ()) if name in values["arms"]]
    try:
        study = StudyConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(explain(error, values, StudyConfig)) from error
    root = study.run_root.resolve()
    return study.model_copy(
        update={
            "run_root": root,
            "data_root": str(Path(study.data_root).resolve()),
            "tracking": study.tracking.resolved(root),
        }
    )


@dataclass(frozen=True)
class SuiteRuns:
    """The runs of one suite.

    Args:
        study: that it is part of.
        name: of the suite.
    """

    study: StudyConfig
    name: str
    _trials: dict[tuple[Any, ...], StudyTrial] = field(default_factory=dict, init=False, compare=False, repr=False)
    _solved: dict[str, AdapterConfig] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def suite(self) -> Suite:
        """Its options."""
        return self.study.suites[self.name]

    @property
    def folder(self) -> Path:
        """Of its data."""
        return self.study.folder / "data" / self.name

    @property
    def manifest(self) -> Path:
        """Of its shards."""
        return self.folder / "shards" / "manifest.json"

    @cached_property
    def values(self) -> dict[str, Any]:
        """The suite's configuration with the study's values over it."""
        values = in_full(read_resolved(Path(self.suite.config or self.name), ()))
        names = [task["name"] for task in values["tasks"]]
        if unknown := sorted(set(self.suite.tasks) - set(names)):
            raise InputError(f"suites.{self.name}.tasks must be of the suite, got {unknown}; it has {names}")
        if self.suite.tasks:
            values["tasks"] = [task for task in values["tasks"] if task["name"] in self.suite.tasks]
        files = {
            task["name"]: {split: f"{task['name']}/{split}.jsonl.gz" for split in ("train", "validation", "test")}
            for task in values["tasks"]
        }
        values |= {
            "run_root": str(self.study.folder / "plans"),
            "name": self.name,
            "data": {"source": "records", "root": str(self.folder / "records"), "files": files},
            "model": values.get("model", {}) | self.study.model.model_dump(exclude_unset=True),
            "tracking": self.study.tracking.model_dump(),
            "training": {"num_workers": 1, "checkpoint_steps": 10**6, "log_steps": 10**6} | values.get("training", {}),
        }
        return values

    def config(self, arm: str, rate: float, seed: int) -> RunConfig:
        """Return the whole configuration of a run.

        Raises:
            InputError: a key is unknown or a value breaks its rule.
        """
        values: dict[str, Any] = parse_json(json.dumps(self.values))
        own = {} if arm == UNTRAINED else self.study.arms[arm].set
        # The study's and the suite's stand under the arm's: what is told of one arm alone is what tells it apart.
        for where, told in ((self.name, self.study.set), (self.name, self.suite.set), (arm, own)):
            for key, value in told.items():
                _put(values, key, value, where)
        _put(values, "training.learning_rate", rate, arm)
        values |= {"seed": seed, "manifest": str(self.manifest)}
        try:
            config = resolved(RunConfig.model_validate(values))
        except ValidationError as error:
            raise InputError(f"suite {self.name}, arm {arm}: {explain(error, values, RunConfig)}") from error
        if arm != UNTRAINED and self.study.arms[arm].prompt == "task_word":
            config = config.model_copy(update={"tasks": tuple(map(with_task_word, config.tasks))})
        return config

    def trial(self, arm: str, rate: float, seed: int, split: str) -> StudyTrial:
        """Return a run as it is carried out."""
        key = (arm, rate, seed, split)
        if key not in self._trials:
            self._trials[key] = self._trial(*key)
        return self._trials[key]

    def _trial(self, arm: str, rate: float, seed: int, split: str) -> StudyTrial:
        from jobs.stages.plan import training_job
        from pipeline.modeling.adapter import adapter_as_trained
        from pipeline.study.trial import StudyTrial

        config = self.config(arm, rate, seed)
        trained = arm != UNTRAINED
        frozen = self.study.frozen_layers
        told = [config.digest(), split, self.suite.shares_heads, trained, self._data, frozen]
        digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:10]
        place = f"{split}-{rate:g}-{seed}-{digest}" if trained else f"{split}-{digest}"
        labels = {"suite": self.name, "arm": arm, "rate": rate if trained else None, "seed": seed}
        folder = self.study.folder / "rows" / self.name / arm / place
        if arm not in self._solved:  # for the rank that gives the size, once an arm
            self._solved[arm] = adapter_as_trained(config.adapter, config.model, len(config.tasks))[0]
        job = training_job(config.model_copy(update={"adapter": self._solved[arm]}))
        return StudyTrial(job, split, folder, labels, self.suite.shares_heads, trained, frozen)

    @cached_property
    def _data(self) -> str:
        return hashlib.sha256(self.manifest.read_bytes()).hexdigest()


def with_task_word(task: TaskSpec) -> TaskSpec:
    """Return a task whose text begins with the task's name in words."""
    from pipeline.modeling.head_encoding import segment_templates

    words = task.name.replace("_", " ")
    first, *rest = segment_templates(task)
    return task.model_copy(
        update={"template": f"Task: {words}\n{task.template}", "segments": (f"{words}: {first}", *rest)}
    )


def _put(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    *path, last = key.split(".")
    place = values
    for part in path:
        if not isinstance(place.setdefault(part, {}), dict):
            raise InputError(
                f"set of {where} must name keys of a run's configuration, got {key!r}: {part!r} is no section"
            )
        place = place[part]
    place[last] = dict(value) if isinstance(value, Mapping) else value
