"""The trials of a search: their configurations, folders and names, and which of them is best."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import ValidationError

from jobs.config import RunConfig
from jobs.config_errors import explain
from jobs.tune_config import TuneConfig
from pipeline.errors import InputError


@dataclass(frozen=True)
class Search:
    """A search as the configuration asks for it.

    Args:
        config: with a ``tune`` section and a validation split.
    """

    config: RunConfig

    @cached_property
    def tune(self) -> TuneConfig:
        """Its section.

        Raises:
            InputError: there is none, or what judges the trials is missing or is the test split.
        """
        tune, validation = self.config.tune, self.config.training.validation
        if tune is None:
            raise InputError(
                "tune needs a section tune in the configuration, got none; add for example "
                "tune: {space: {training.learning_rate: {log_uniform: [1.0e-4, 1.0e-2]}}}"
            )
        if self.config.store_root is not None:
            raise InputError(
                f"tune keeps its trials on a disk that all nodes share, got run_root {self.config.store_root!r}; name "
                "a run_root on such a disk"
            )
        if validation is None:
            raise InputError(
                "tune judges trials by training.validation, got null; set training.validation.every_steps, and a "
                "validation split (data.splits or TASK/validation files)"
            )
        if validation.split == self.config.evaluation.split:
            raise InputError(
                f"training.validation.split must not be the split of the evaluation, got {validation.split!r} for "
                "both: what is chosen on a split cannot be judged on it; name another"
            )
        known = ["macro", *(task.name for task in self.config.tasks)]
        if tune.metric not in known:
            raise InputError(f"tune.metric must be one of {known}, got {tune.metric!r}; name one of them")
        return tune

    @property
    def name(self) -> str:
        """Of the search's folder under the run root and of its MLflow run."""
        return f"{self.config.name}-tune"

    @property
    def parent(self) -> RunConfig:
        """The configuration under which the search itself is a run."""
        return self._shared(self.config).model_copy(update={"name": self.name, "tune": None})

    @property
    def identity(self) -> str:
        """Digest of all that decides what a trial of a number reaches; more trials do not change it."""
        parts = [self.config.digest(), self.tune.model_dump(mode="json", exclude={"trials", "max_concurrent"})]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def trial_name(self, trial: int) -> str:
        """Return the name of a trial's folder and MLflow run."""
        return f"{self.name}-{trial:03d}"

    def trial(self, number: int) -> RunConfig:
        """Return the whole configuration of a trial, in a folder of its own, on the shards of all.

        Raises:
            InputError: a drawn value breaks its rule, a key is unknown, or a value asks for other shards.
        """
        config, root = self._tried(number), self.config.run_root / self.name
        validation = config.training.validation
        steps = config.training.checkpoint_steps if validation is None else validation.every_steps
        # A trial that was killed goes on from its last measurement.
        kept = {"checkpoint_steps": min(steps, config.training.checkpoint_steps), "keep_checkpoints": 1}
        training = config.training.model_copy(update=kept)
        return config.model_copy(
            update={"name": self.trial_name(number), "run_root": root, "tune": None, "training": training}
        )

    def values(self, number: int) -> dict[str, Any]:
        """Return what a trial has of the searched keys: what was drawn, or what stands in the configuration."""
        return self.tune.drawn(number) or {key: self._standing(key) for key in self.tune.space}

    def _standing(self, key: str) -> Any:
        found: Any = _written_out(self.config)
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def trials(self) -> list[RunConfig]:
        """Return the configurations of all trials; every one is checked.

        Raises:
            InputError: see :meth:`trial`.
        """
        for key, values in self.tune.space.items():  # every choice, drawn or not
            for value in values.choice or ():
                self._with({key: value}, "tune.space")
        return [self.trial(number) for number in range(self.tune.trials)]

    def best(self, number: int) -> RunConfig:
        """Return the configuration that a trial recommends: a run of its own beside the others, of one rank as it was
        tried, so that it measures the same."""
        return self._tried(number).model_copy(update={"name": f"{self.config.name}-best", "tune": None})

    def _tried(self, number: int) -> RunConfig:
        config = self._shared(self._with(self.tune.drawn(number), f"trial {number}"))
        training = config.training.model_copy(update={"num_workers": 1, "min_workers": None})
        return config.model_copy(update={"training": training})

    def _with(self, values: Mapping[str, Any], where: str) -> RunConfig:
        """Return the configuration with other values.

        Raises:
            InputError: see :func:`with_values`; or a task would be read or asked in another way than in the shards.
        """
        found = with_values(self.config, values, where)
        held, asked = ({task.name: task.as_prepared() for task in config.tasks} for config in (self.config, found))
        if held != asked:
            raise InputError(
                "tune.space must leave alone how tasks are read, asked and judged, which stands in the shards that all "
                f"trials share, got {sorted(key for key in values if key.startswith('tasks'))}; of a task only "
                "class_weights can be searched: search once for each way of asking, under another name"
            )
        return found

    def _shared(self, config: RunConfig) -> RunConfig:
        if self.config.publish:
            manifest: Path | str = self.config.manifest_path
        else:
            manifest = str(self.config.manifest_path)
        return config.model_copy(update={"manifest": str(manifest), "publish": None})


def _written_out(config: RunConfig) -> dict[str, Any]:
    whole = config.model_dump(mode="json")
    whole["recipe"] = None  # its values stand written out
    whole["tasks"] = {task.pop("name"): task for task in whole["tasks"]}
    return whole


def with_values(config: RunConfig, values: Mapping[str, Any], where: str) -> RunConfig:
    """Return a configuration with other values.

    Args:
        config: resolved.
        values: by dotted key; ``tasks.NAME.…`` names a task's.
        where: they come from, for the message.

    Raises:
        InputError: a key is unknown or a value breaks its rule.
    """
    if not values:
        return config
    whole = _written_out(config)
    for key, value in values.items():
        *path, last = key.split(".")
        place = whole
        for part in path:
            if not isinstance(place.get(part), dict):
                raise InputError(
                    f"tune.space must name keys that the configuration has, got {key!r}: {part!r} is no "
                    "section of it; set the section first, or correct the key"
                )
            place = place[part]
        place[last] = value
    try:
        return RunConfig.model_validate(whole)
    except ValidationError as error:
        shown = ", ".join(f"{key}={value}" for key, value in values.items())
        raise InputError(f"{where} ({shown}): {explain(error, whole, RunConfig)}") from error


@dataclass(frozen=True)
class Outcome:
    """What a trial has reached.

    Args:
        number: of the trial.
        values: that were drawn for it, by key.
        state: ``finished``, ``stopped`` early, or ``failed``.
        curve: (step, metric) of each measurement.
        reason: why it failed.
    """

    number: int
    values: Mapping[str, Any]
    state: str
    curve: Sequence[tuple[int, float]]
    reason: str = ""

    @property
    def best(self) -> float | None:
        """The best mean of two neighbouring measurements, so that a lucky one alone decides nothing; of a single
        measurement that one, None without any."""
        values = [value for _, value in self.curve]
        return max((mean(pair) for pair in pairwise(values)), default=values[0] if values else None)


def curve(history: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[int, float]]:
    """Return (step, metric) of each measurement in a training history."""
    return [(row["step"], row["validation"][metric]) for row in history if "validation" in row]


def best_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the best outcome of the trials that did all their steps, else of those that were ended early; of equal
    ones the first.

    Raises:
        InputError: no trial was measured.
    """
    measured = [outcome for outcome in outcomes if outcome.state != "failed" and outcome.best is not None]
    judged = [outcome for outcome in measured if outcome.state == "finished"] or measured
    if not judged:
        reasons = "; ".join(sorted({outcome.reason for outcome in outcomes if outcome.reason}))
        raise InputError(f"at least one trial must be measured, none was: {reasons}; change the space")
    return max(judged, key=lambda outcome: (outcome.best, -outcome.number))
