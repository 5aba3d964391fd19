"""What a comparison of methods is told; imports neither torch nor Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.modeling.config import BaseModelConfig
from pipeline.orchestration.config import RayConfig
from pipeline.settings import Settings
from pipeline.storage import is_remote
from pipeline.tracking import TrackingConfig

Prompt = Literal["plain", "task_word"]
NAME = r"^[a-z0-9][a-z0-9_]*$"


class SampleCounts(Settings):
    """Most samples a task, taken by a hash of the record's id, so that tasks on the same records take the same."""

    train: int = Field(default=400, ge=1)
    """To train on."""
    validation: int = Field(default=100, ge=10)
    """Carved from the train records, to choose the learning rate by."""
    test: int = Field(default=200, ge=10)
    """To judge by."""


class Suite(Settings):
    """Tasks that are trained together."""

    config: str | None = None
    """Packaged configuration that has them, or a file's path; null: the one of the suite's own name. ``offers`` and
    ``review_questions`` are made from the data first."""
    tasks: tuple[str, ...] = ()
    """Only these; empty for all."""
    samples: SampleCounts | None = None
    """Instead of the study's."""
    train_samples: dict[str, int] = Field(default_factory=dict)
    """Task → most train samples, where it differs."""
    flipped: dict[str, float] = Field(default_factory=dict)
    """Binary task → share of its train labels that are turned over."""
    shares_heads: bool = False
    """An encoder's tasks with the same classes answer by one head, so that nothing but prompt and adapter tells them
    apart, as with a language model's label words."""
    arms: tuple[str, ...] = ()
    """Only these; empty for all."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted key of a run's configuration → value, such as ``model.max_length: 64``."""


class Arm(Settings):
    """One way to train."""

    title: str = ""
    """What the table calls it; empty: its name."""
    prompt: Prompt = "plain"
    """``task_word`` writes the task's name before each text."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted key of a run's configuration → value, over the study's, such as ``adapter.method: dora``."""


class StudyConfig(Settings):
    """Suites × arms × learning rates × seeds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The study's folder under ``run_root``."""
    run_root: Path = Path("runs")
    """Folder of all runs."""
    data_root: str
    """Folder of the data: ``SUITE/TASK/SPLIT.jsonl.gz``."""
    suites: dict[str, Suite] = Field(min_length=1)
    """By name; ``study.suites`` on the command line takes a part of them."""
    arms: dict[str, Arm] = Field(min_length=1)
    """By name, in the order of the table."""
    reference: tuple[str, ...]
    """The arms of which the best is what every arm is held against."""
    recipes: tuple[str, ...] = ()
    """The arms of which the best, chosen on the development part, stands for the method that is studied."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted key of a run's configuration → value, for all arms alike."""
    model: BaseModelConfig = BaseModelConfig()
    """The frozen base of all."""
    frozen_layers: int = Field(default=0, ge=0)
    """So many lower layers of an encoder hold no adapter, in any arm: their states are computed once and kept. The
    layers above are numbered from 0."""
    samples: SampleCounts = SampleCounts()
    """Of each task."""
    learning_rates: tuple[float, ...] = Field(min_length=2)
    """Tried by every arm on the development part, in rising order."""
    widenings: int = Field(default=3, ge=0)
    """How often an arm's grid may grow by one rate where its best one lies at an edge."""
    search_seed: int = Field(default=0, ge=0)
    """Of the search's runs."""
    seeds: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    """Of the runs at the chosen rate, which the table is made of."""
    workers: int = Field(default=1, ge=1)
    """Runs at a time; more than one are Ray tasks of one CPU or GPU each."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of a run under Ray."""
    notes: tuple[str, ...] = ()
    """Sentences that stand under the table: what is scaled down, what is by construction."""
    tracking: TrackingConfig = TrackingConfig()
    """Where runs are recorded."""
    ray: RayConfig = RayConfig()
    """Cluster that runs them, with several workers."""

    @field_validator("run_root", mode="before")
    @classmethod
    def _on_disk(cls, root: Any) -> Any:
        if is_remote(root):
            raise ValueError(f"run_root of a study must be a folder on a disk that all nodes share, got {root!r}")
        return root

    @model_validator(mode="after")
    def _check(self) -> Self:
        rates = list(self.learning_rates)
        if rates != sorted(set(rates)) or rates[0] <= 0:
            raise ValueError(f"learning_rates must rise and be above zero, got {rates}; sort them")
        lists = {"reference": self.reference, "recipes": self.recipes}
        lists |= {f"suites.{name}.arms": suite.arms for name, suite in self.suites.items()}
        for where, names in lists.items():
            if unknown := sorted(set(names) - set(self.arms)):
                raise ValueError(f"{where} must name arms, got {unknown}; there are {list(self.arms)}")
        if not self.reference:
            raise ValueError("reference must name the arms that the others are held against, got none; name lora")
        return self

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return self.run_root / self.name

    def arms_of(self, suite: str) -> dict[str, Arm]:
        """Return the arms of a suite in the table's order."""
        only = self.suites[suite].arms
        return {name: arm for name, arm in self.arms.items() if not only or name in only}

    def samples_of(self, suite: str) -> SampleCounts:
        """Return the counts of a suite."""
        return self.suites[suite].samples or self.samples
