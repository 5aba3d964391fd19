"""One run as the stages see it: its configuration, its folder, and its doors to MLflow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.config import RunConfig
from jobs.run_folder import RunFolder
from pipeline.mirror import Mirror, SharedFolder
from pipeline.storage import is_remote
from pipeline.stream import load_manifest, manifest_sha256
from pipeline.stream.manifest import manifest_location
from pipeline.tracking import DataSet, Tracker, git_commit, read_history

if TYPE_CHECKING:
    from pipeline.modeling.adapter_config import AdapterConfig
    from pipeline.promotion.registry import Registry


def _always() -> None:
    return


@contextlib.contextmanager
def root_file(config: RunConfig, name: str) -> Iterator[Path]:
    """Within it a file of the root of all runs may be read and written; it is brought and sent where that is a URL."""
    mirror = None if config.store_root is None else Mirror(config.store_root, config.run_root)
    path = config.run_root / name
    if mirror is not None:
        mirror.fetch(name)
    yield path
    if mirror is not None and path.is_file():
        mirror.put(name)


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        config: everything it was told.
        may_go_on: asked between the stages, the last time right before the champion changes; what it raises ends the
            run there. It returns the number of the lease that is held, None without one.
        tags: of its MLflow run, beside those that every run has.
    """

    config: RunConfig
    may_go_on: Callable[[], int | None] = _always
    tags: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def folder(self) -> RunFolder:
        """Its folder; where it lies on object storage, the working copy, brought up to date when it is first asked."""
        if self.mirror is not None:
            self.mirror.pull()
            warm_start = self.config.training.warm_start
            if warm_start is not None and (owner := self._owner(warm_start)) is not None and owner.mirror is not None:
                owner.mirror.pull(warm_start.relative_to(owner.config.folder).as_posix())
        return RunFolder(self.config.folder)

    @cached_property
    def mirror(self) -> Mirror | None:
        """The run's folder on object storage, None where it is on a disk."""
        store = self.config.store
        return None if store is None else Mirror(store, self.config.folder)

    def keep(self, under: Path | None = None) -> None:
        """Send what is new in the working copy to object storage, if the folder lies there.

        Args:
            under: only this file or folder.
        """
        if self.mirror is not None:
            self.mirror.push("" if under is None else under.relative_to(self.config.folder).as_posix())

    def shared(self, folder: Path) -> Path | SharedFolder:
        """Return a folder as every node finds it, if it is of a run under the same root; any other as it is."""
        owner = self._owner(folder)
        if owner is None or owner.mirror is None:
            return folder
        owner.keep(folder)
        return SharedFolder(owner.mirror.url, folder.relative_to(owner.config.folder).as_posix())

    def fetch(self, path: Path) -> Path:
        """Return a file of the run's folder; where that lies on object storage, this file as it is there now."""
        if self.mirror is not None:
            self.mirror.fetch(path.relative_to(self.config.folder).as_posix())
        return path

    def _owner(self, folder: Path) -> Run | None:
        """Return the run under the same root that a folder belongs to, None for one elsewhere."""
        root = self.config.run_root
        if not folder.is_relative_to(root):
            return None
        name = folder.relative_to(root).parts[0]
        return self if name == self.config.name else self.other(name)

    @cached_property
    def registry(self) -> Registry:
        """The registered model that it may become a version of."""
        from pipeline.promotion.registry import Registry

        return Registry(self.config.promotion.model_name, self.config.tracking.uri)

    @cached_property
    def adapter(self) -> AdapterConfig:
        """The adapter as it is trained: with its rank, solved where the configuration asks for a size."""
        from pipeline.modeling.adapter import adapter_as_trained

        config = self.config
        return adapter_as_trained(config.adapter, config.model, len(config.tasks), config.training.warm_start)[0]

    @property
    def samples(self) -> dict[str, str]:
        """What tells the samples that are scored from any others: ``manifest_sha256`` and ``split``."""
        return {"manifest_sha256": manifest_sha256(self.config.manifest_path), "split": self.config.evaluation.split}

    def other(self, name: str) -> Run:
        """Return another run under the same root, under this one's configuration."""
        return Run(self.config.model_copy(update={"name": name}))

    def tracker(self) -> Tracker:
        """Return the MLflow run of this folder, opening it the first time."""
        config, known = self.config, self.folder.binding
        if known.get("mlflow_uri") == config.tracking.shown:
            return Tracker(config.tracking.uri, known["mlflow_run_id"])
        data_sets = self.data_sets()
        tags = {"git_commit": git_commit(), "manifest_sha256": data_sets["training"].manifest_sha256, **self.tags}
        parameters = config.shown()
        if config.adapter.size is not None:
            parameters["adapter"] |= {key: getattr(self.adapter, key) for key in ("r", "lora_alpha")}
        parameters["tasks"] = ", ".join(task.name for task in config.tasks)
        tracker = Tracker.start(config.tracking, config.name, parameters, tags, self._artifacts)
        tracker.log_data(*data_sets.values())
        self.folder.note(config.digest(), mlflow_uri=config.tracking.shown, mlflow_run_id=tracker.run_id)
        return tracker

    @property
    def _artifacts(self) -> str:
        return f"{self.config.store_root or self.config.run_root.resolve().as_uri()}/mlartifacts"

    def data_sets(self) -> dict[str, DataSet]:
        """Return the samples of the shards as they are now: those for ``training`` and those for ``evaluation``."""
        place = manifest_location(self.config.manifest_path)
        manifest, digest, _ = load_manifest(place, self.config.cache.patience_s)
        place = place if is_remote(place) else str(Path(place).resolve())
        splits = {"training": "train", "evaluation": self.config.evaluation.split}
        counts = {
            split: {t.name: manifest.samples_of(t.name, split) for t in manifest.tasks} for split in splits.values()
        }
        return {context: DataSet(context, split, place, digest, counts[split]) for context, split in splits.items()}

    def history(self) -> list[dict[str, Any]]:
        """Return the rows of the training history."""
        return read_history(self.folder.history)

    def last_step(self) -> int:
        """Return the last step of the training history, 0 without one."""
        rows = self.history()
        return int(rows[-1]["step"]) if rows else 0
