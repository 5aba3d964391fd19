"""The run's configuration: the sum of its parts' configurations, read from YAML and ``key.sub=value`` overrides."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, ValidationError, model_validator

from jobs.config_errors import explain
from jobs.config_file import read_resolved
from jobs.notices import NoticesConfig
from jobs.recipes import over_recipe
from jobs.run_folder import RunFolder
from jobs.run_root import as_named, on_this_machine
from jobs.tune_config import TuneConfig
from pipeline.contracts import TaskSpec, write_atomic
from pipeline.errors import InputError
from pipeline.evaluation.config import EvaluationConfig
from pipeline.ingestion import DataConfig, DriftConfig, with_columns
from pipeline.modeling.adapter_config import AdapterConfig
from pipeline.modeling.config import BaseModelConfig
from pipeline.orchestration.config import RayConfig
from pipeline.promotion.gates import GatesConfig, LiveConfig
from pipeline.schemes import WRITABLE, scheme_of
from pipeline.settings import Settings
from pipeline.stream import CacheConfig, LengthGrouping, Mixture, Proportional
from pipeline.synthetic import synthetic_ads_tasks
from pipeline.tracking import TrackingConfig
from pipeline.training.config import TrainingConfig

_OPERATION = (
    *("num_workers", "min_workers", "max_failures", "hang_timeout_s"),
    *("resources_per_worker", "accelerator_type", "placement_strategy"),
    *("checkpoint_steps", "keep_checkpoints", "log_steps", "ledger"),
)
"""Keys of ``training`` that may change while a run is under way: ranks come and go, the samples of a step stay."""


_LATER = {"mixing_learning_rate": None, "head_learning_rate": None, "orthogonality": 0.0}
"""Keys of ``training`` that came after runs had been trained without them: unused, they change no digest."""


class PromotionConfig(Settings):
    """Under which name a model is registered, and what it must pass."""

    model_name: str = Field(default="ads-relevance", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Of the registered model."""
    gates: GatesConfig = GatesConfig()
    """What a candidate must show before it may become champion."""
    live: LiveConfig | None = None
    """What it must show on live requests, too; null for the holdout alone."""
    anchor: int | None = Field(default=None, ge=1)
    """Version that candidates are held against beside the champion, so that small falls do not add up; null for the
    best earlier champion that the ledger knows. Name another where its files are gone, or to accept a lower level."""


class RetrainingConfig(Settings):
    """The weekly loop over daily partitions ``data.root/DATE/TASK.jsonl.gz``: what each retraining reads and holds."""

    holdout_days: int = Field(default=1, ge=1)
    """Newest days, on which champion and challenger are scored; the next retraining trains on them."""
    window_days: int | None = Field(default=None, ge=1)
    """Most days that the first training reads; later ones read all that is new."""
    replay_days: int = Field(default=28, ge=0)
    """Days before the new ones, a share of which is mixed in; 0 for none."""
    replay_share: float = Field(default=0.1, gt=0, le=1)
    """Share of the replayed days' samples that is mixed in."""
    warm_start: bool = True
    """Begin with the champion's adapter; else from scratch."""
    only_new_tasks: bool = False
    """When tasks are new, train their own parts alone and leave everything the others use untouched, which then learn
    nothing from these days; needs ``warm_start``."""
    max_champion_drop: float | None = Field(default=0.15, gt=0)
    """How far the champion may fall on the newest days below what it scored when it was promoted; further, the labels
    or the data have changed, and the run holds before anything is trained."""
    complete_file: str | None = "_SUCCESS"
    """Marker that a partition is whole; null takes every partition as whole."""
    known_gaps: tuple[dt.date, ...] = ()
    """Days that will never come."""
    lease_ttl_s: float = Field(default=120, gt=0)
    """Seconds without a sign of life after which another process may take over."""
    every_days: int = Field(default=7, ge=1)
    """Days between two runs, for ``--backfill``."""

    @model_validator(mode="after")
    def _check(self) -> RetrainingConfig:
        if self.only_new_tasks and not self.warm_start:
            raise ValueError(
                "retraining.only_new_tasks needs warm_start, the champion that is left untouched, got warm_start "
                "false; choose one of the two"
            )
        return self


class ScheduleConfig(Settings):
    """When ``mtl-lora schedule`` retrains."""

    cron: str = "0 3 * * 1"
    """Minute, hour, day of the month, month, day of the week (0 or 7 is Sunday, 1 or mon Monday)."""
    timezone: str = "UTC"
    """Of the cron line, such as ``Europe/Paris``."""


class RunConfig(Settings):
    """Everything a run is told."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder under ``run_root``."""
    run_root: Path = Path("runs")
    """Folder of all runs, on storage that all nodes of a cluster share: a path, or a folder in ``s3://``, ``gs://``,
    ``az://`` or ``abfs://``, of which each machine keeps a working copy in ``MTL_LORA_CACHE``."""
    seed: int = Field(default=0, ge=0)
    """Of the order of the samples, the adapter's start, dropout and the bootstrap."""
    recipe: str | None = None
    """Packaged settings that stand under this file's own: ``paper`` (the authors'), ``paper_image_text`` (the authors'
    of their image-text runs) or ``default``; ``config show`` marks what comes from it."""
    data: DataConfig = DataConfig()
    """What is read, from where, and how strictly."""
    manifest: str | None = None
    """Shards that stand prepared: their ``manifest.json`` or its folder, a path or URL. ``prepare`` then
    only checks them, and ``data`` is not read."""
    publish: str | None = None
    """Folder in ``s3://``, ``gs://``, ``az://`` or ``abfs://`` to which ``prepare`` uploads the shards, and from which
    they are then read. Its credentials are those in the environment."""
    cache: CacheConfig = CacheConfig()
    """Where shards from afar are kept."""
    drift: DriftConfig = DriftConfig()
    """Comparison of the data with earlier data, before anything is trained."""
    tasks: tuple[TaskSpec, ...] = ()
    """In YAML a mapping of name to task, or a list; empty with synthetic data: its four tasks."""
    model: BaseModelConfig = BaseModelConfig()
    """The frozen model under the adapter."""
    adapter: AdapterConfig = AdapterConfig()
    """The adapter that is trained."""
    mixture: Mixture = Proportional()
    """How tasks share the batches."""
    length_grouping: LengthGrouping | None = None
    """Within how many steps samples change places with others of like length, for less padding; null: not at all."""
    training: TrainingConfig = TrainingConfig()
    """How it is trained."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How it is scored."""
    promotion: PromotionConfig = PromotionConfig()
    """Under which name it is registered, and what it must pass."""
    retraining: RetrainingConfig | None = None
    """Null: ``retrain`` runs once over the data as configured."""
    tune: TuneConfig | None = None
    """What ``mtl-lora tune`` searches."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Times at which ``mtl-lora schedule`` retrains."""
    notices: NoticesConfig = NoticesConfig()
    """Where what was decided is sent."""
    tracking: TrackingConfig = TrackingConfig()
    """Where runs, metrics and models are recorded."""
    ray: RayConfig = RayConfig()
    """Cluster that runs the job."""
    _store: str | None = PrivateAttr(default=None)

    @model_validator(mode="wrap")
    @classmethod
    def _root_on_storage(cls, values: Any, handler: ModelWrapValidatorHandler[RunConfig]) -> RunConfig:
        if not isinstance(values, dict):
            return handler(values)
        values, store = on_this_machine(values)
        config = handler(values)
        config._store = store
        return config

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        return over_recipe(in_full(values)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        names = [task.name for task in self.tasks]
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise ValueError(f"task names must differ, got {doubles} twice; rename one of each")
        scheme = scheme_of(self.publish or "")
        if self.publish and (self.manifest or scheme is None or not scheme.is_writable):
            raise ValueError(
                f"publish must be a folder in {WRITABLE} for shards that this run prepares, got "
                f"publish {self.publish!r} with manifest {self.manifest!r}; leave one of them out, or name a bucket"
            )
        if self.tasks and (unknown := self.promotion.gates.unknown_names(names)) is not None:
            raise ValueError(unknown)
        if not self.tasks and self.data.source != "synthetic_ads":
            raise ValueError("tasks must name at least one task, got none; give each a template and label_words")
        if self.model.quantization and self.training.zero_stage == 3:
            raise ValueError(
                f"model.quantization must be null with training.zero_stage 3, which splits plain weights alone, got "
                f"{self.model.quantization!r}; choose zero_stage 0, 1 or 2, or leave model.quantization out"
            )
        if self.training.conflict_steps and self.adapter.method == "lora_per_task":
            raise ValueError(
                "training.conflict_steps must be null with adapter.method lora_per_task, whose tasks share nothing "
                f"whose gradients could conflict, got {self.training.conflict_steps}; leave it out"
            )
        if self.retraining is not None and (self.data.source != "records" or self.data.windows):
            raise ValueError(
                "retraining reads daily partitions: data.source must be 'records' and data.windows empty, "
                f"got {self.data.source!r} and {self.data.windows}; name their folder in data.root"
            )
        return self

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run_root / self.name

    @property
    def store_root(self) -> str | None:
        """``run_root`` where it is a URL, of which the field is this machine's working copy."""
        return self._store

    @property
    def store(self) -> str | None:
        """URL of the run's folder where ``run_root`` is one, of which ``folder`` is this machine's working copy."""
        return None if self._store is None else f"{self._store}/{self.name}"

    @property
    def shards(self) -> Path:
        """Where the run writes its own shards."""
        return RunFolder(self.folder).shards

    @property
    def manifest_path(self) -> Path | str:
        """The manifest that is read: the one given, the published one, or that of the run's own shards."""
        if self.publish:
            return f"{self.publish.rstrip('/')}/{RunFolder(self.folder).manifest.name}"
        if self.store is not None and self.manifest is None:
            return f"{self.store}/{RunFolder(Path()).manifest}"
        return self.manifest or RunFolder(self.folder).manifest

    def digest(self) -> str:
        """Return the digest of what decides the trained adapter: equal digests, equal adapter."""
        parts = self.model_dump(
            mode="json",
            include={"seed", "data", "manifest", "tasks", "model", "adapter", "mixture", "length_grouping", "training"},
        )
        for key in _OPERATION:
            del parts["training"][key]
        for key, unused in _LATER.items():
            if parts["training"][key] == unused:
                del parts["training"][key]
        # Exact ones change no bit, wherever they are; but images then go through the base one by one.
        shown = any(task.image_field for task in self.tasks)
        if (kept := parts["training"].pop("kept_states")) and (shown or kept["precision"] != "exact"):
            parts["training"]["kept_states"] = kept["precision"]
        parts["adapter"] = self.adapter.identity()
        parts["training"]["warm_start"] = as_named(parts["training"]["warm_start"], self._store, self.run_root)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def write(self) -> Path:
        """Write the resolved configuration into the run's folder and return its path."""
        path = RunFolder(self.folder).config
        write_atomic(path, self.as_yaml())
        return path

    def as_yaml(self) -> str:
        """Return the configuration as YAML, to be read by :func:`load_config`.

        A tracking URI that the environment gave, or the default one, is left open: whoever reads the file has his own.
        So is one with a password, which stands in no file: :attr:`pipeline.tracking.TrackingConfig.is_secret`.
        """
        values = self._as_given()
        if self.tracking.is_secret or self.tracking.uri == TrackingConfig().resolved(self.run_root).uri:
            values["tracking"]["uri"] = ""
        return yaml.safe_dump(values, sort_keys=False, width=120)

    def shown(self) -> dict[str, Any]:
        """Return the values for eyes: no password among them."""
        values = self._as_given()
        values["tracking"]["uri"] = self.tracking.shown
        return values

    def _as_given(self) -> dict[str, Any]:
        """Return the values as JSON, a place under ``run_root`` by its URL where that is one."""
        values = self.model_dump(mode="json")
        values["run_root"] = self._store or values["run_root"]
        values["training"]["warm_start"] = as_named(values["training"]["warm_start"], self._store, self.run_root)
        return values


def in_full(values: dict[str, Any]) -> dict[str, Any]:
    """Return a file's values without short forms: a mixture that is named, tasks under their names.

    Raises:
        ValueError: a task is no mapping.
    """
    values = dict(values)
    if isinstance(values.get("mixture"), str):
        values["mixture"] = {"kind": values["mixture"]}
    if isinstance(values.get("tasks"), dict):
        for name, task in values["tasks"].items():
            if not isinstance(task, dict):
                raise ValueError(f"tasks.{name} must be a mapping with template and label_words, got {task!r}")
        values["tasks"] = [{"name": name, **task} for name, task in values["tasks"].items()]
    return values


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override, check and resolve a configuration: no relative path and no default is left open.

    Raises:
        InputError: the file is missing or no YAML, a key is unknown, or a value breaks its rule.
    """
    values = read_resolved(path, overrides)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(explain(error, values, RunConfig)) from error
    return resolved(config)


def resolved(config: RunConfig) -> RunConfig:
    """Return a configuration in which no relative path and no default is left open."""
    root = config.run_root.resolve()
    changes: dict[str, Any] = {"run_root": root, "tracking": config.tracking.resolved(root)}
    if config.store is not None and changes["tracking"].uri == TrackingConfig().resolved(root).uri:
        raise InputError(
            f"runs in {config.store_root} need an MLflow that all nodes reach, tracking.uri is not set; "
            "set tracking.uri or MLFLOW_TRACKING_URI to a server"
        )
    if not config.tasks:
        changes["tasks"] = tuple(synthetic_ads_tasks())
    elif config.data.columns or any(task.columns for task in config.tasks):
        changes["tasks"] = with_columns(config.data, config.tasks)
    if config.data.root and "://" not in config.data.root:
        changes["data"] = config.data.model_copy(update={"root": str(Path(config.data.root).resolve())})
    if config.manifest:
        changes["manifest"] = _absolute(config.manifest)
    if config.drift.against:
        changes["drift"] = config.drift.model_copy(update={"against": _absolute(config.drift.against)})
    if config.cache.folder:
        changes["cache"] = config.cache.model_copy(update={"folder": _absolute(config.cache.folder)})
    kept = config.training.kept_states
    if kept is not None and kept.folder:
        kept = kept.model_copy(update={"folder": _absolute(kept.folder)})
        changes["training"] = config.training.model_copy(update={"kept_states": kept})
    folder = Path(config.model.base).resolve()
    if config.model.is_folder and (folder.exists() or not config.model.looks_like_hub_id):
        changes["model"] = config.model.model_copy(update={"base": str(folder)})
    return config.model_copy(update=changes)


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).expanduser().resolve())
