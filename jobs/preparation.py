"""The data of a run: its own shards or given ones, and how far they have drifted from earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jobs import tables
from jobs.config import RunConfig
from jobs.run_folder import DRIFT
from pipeline import orchestration
from pipeline.contracts import ShardManifest
from pipeline.errors import HeldBack, InputError
from pipeline.ingestion import DriftReport, Mapper, compare_drift, prepare
from pipeline.progress import Track
from pipeline.stream import load_manifest

_PASSES = {"scan_unit": "read records", "write_shards": "write shards"}
_REASONS_SHOWN = 5


def prepared(config: RunConfig, append: bool = False) -> ShardManifest:
    """Return the manifest of the run's shards, writing them where they do not stand; or that of given ones.

    Raises:
        InputError: whatever ingestion refuses; given shards are of other tasks, or are to be appended to.
    """
    if config.manifest is None:
        from pipeline.modeling.base_model import resolve_base

        data = config.data
        if data.length_tokenizer is None:  # so that lengths are known in the model's own tokens
            data = data.model_copy(update={"length_tokenizer": str(resolve_base(config.model) / "tokenizer.json")})
        mapper = _shown(orchestration.mapper(config.ray))
        return prepare(data, config.tasks, config.shards, config.seed, mapper, append)
    if append:
        raise InputError(
            f"only a run's own shards can be appended to, got manifest={config.manifest!r}; leave manifest out"
        )
    manifest, _, _ = load_manifest(config.manifest, config.cache.patience_s)
    given, asked = ({task.name: task for task in tasks} for tasks in (manifest.tasks, config.tasks))
    if other := sorted(name for name in given.keys() | asked.keys() if given.get(name) != asked.get(name)):
        raise InputError(
            f"tasks must be those of the given shards, with equal templates and label words, {other} are not (there: "
            f"{sorted(given)}); copy them from the configuration that prepared {config.manifest}"
        )
    return manifest


def _shown(mapper: Mapper) -> Mapper:
    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        items = list(items)
        with Track(_PASSES[function.__name__], len(items), "parts") as track:
            for result in mapper(function, items):
                track.advance()
                yield result

    return run


def check_drift(config: RunConfig) -> None:
    """Hold the run's data against earlier data, write ``drift.json``, and show what has drifted.

    Raises:
        HeldBack: a measure is past what holds a run back.
        InputError: there is no earlier data where it was said to be.
    """
    path = config.folder / DRIFT
    if config.drift.against is None:
        path.unlink(missing_ok=True)
        return
    found = compare_drift(config.drift.against, config.manifest or config.shards, config.drift.thresholds)
    is_new = not path.is_file() or DriftReport.read(path) != found
    found.write(path)
    if is_new and found.verdict != "ok":
        tables.show_drift(found)
    if found.verdict == "hold":
        reasons = "; ".join(found.reasons[:_REASONS_SHOWN])
        raise HeldBack(f"the data has drifted from {config.drift.against}: {reasons}; see {path}")
