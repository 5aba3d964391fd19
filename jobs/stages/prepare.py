"""Records → shards with a manifest, held against earlier data; or given shards, found whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jobs import tables
from jobs.config import RunConfig
from jobs.run import Run
from jobs.run_folder import DRIFT
from jobs.stages.check import check
from pipeline import ingestion
from pipeline.contracts import ShardManifest
from pipeline.errors import HeldBack, InputError
from pipeline.ingestion import Mapper, compare_drift, publish
from pipeline.orchestration.environment import inside_job
from pipeline.orchestration.mapping import mapper
from pipeline.progress import Track, say
from pipeline.stream import load_manifest

_PASSES = {"scan_unit": "read records", "write_shards": "write shards", "adopt_shard": "index shards"}
_REASONS_SHOWN = 5


def prepare(run: Run, append: bool = False) -> ShardManifest:
    """Write the run's shards, or find them written; check their drift; publish them where that is asked for.

    Args:
        run: whose data is prepared.
        append: add what ``data`` names to the shards that are there, as a further partition.

    Raises:
        HeldBack: the data has drifted too far from the earlier one.
        InputError: the folder is another configuration's, or whatever ingestion refuses.
    """
    config = run.config
    if not append:
        run.folder.check_configuration(config.digest())
    check(config)
    config.write()
    stood = run.folder.manifest.is_file()
    manifest = (
        _own_shards(config, append) if config.manifest is None else _given_shards(config, config.manifest, append)
    )
    run.keep(run.folder.shards)
    _check_drift(run)
    if config.publish:
        say(f"published as {publish(config.shards, config.publish, config.cache.patience_s)}")
    counts = {split: sum(manifest.samples_of(t.name, split) for t in manifest.tasks) for split in ("train", "test")}
    words = f"{len(manifest.shards)} shards: {counts['train']} train, {counts['test']} test samples"
    if not (stood and inside_job()):  # else whoever submitted the job has said so
        say(f"{words}, {sum(r.records for r in manifest.rejected)} rejected")
    return manifest


def _own_shards(config: RunConfig, append: bool) -> ShardManifest:
    from pipeline.modeling.base_model import resolve_base

    data = config.data
    if data.length_tokenizer is None:  # so that lengths are known in the model's own tokens
        data = data.model_copy(update={"length_tokenizer": str(resolve_base(config.model) / "tokenizer.json")})
    over_all = mapper(config.ray) if config.store is None else map  # no other machine sees a working copy
    return ingestion.prepare(data, config.tasks, config.shards, config.seed, _shown(over_all), append)


def _given_shards(config: RunConfig, place: str, append: bool) -> ShardManifest:
    if append:
        raise InputError(f"only a run's own shards can be appended to, got manifest={place!r}; leave manifest out")
    manifest, _, _ = load_manifest(place, config.cache.patience_s)
    given, asked = ({task.name: task.as_asked() for task in tasks} for tasks in (manifest.tasks, config.tasks))
    if other := sorted(name for name in given.keys() | asked.keys() if given.get(name) != asked.get(name)):
        raise InputError(
            f"tasks must be those of the given shards, with equal templates and label words, {other} are not (there: "
            f"{sorted(given)}); copy them from the configuration that prepared {place}"
        )
    return manifest


def _shown(over_all: Mapper) -> Mapper:
    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        items = list(items)
        with Track(_PASSES[function.__name__], len(items), "parts") as track:
            for result in over_all(function, items):
                track.advance()
                yield result

    return run


def _check_drift(run: Run) -> None:
    """Hold the run's data against earlier data, write the report, and show what has drifted.

    Raises:
        HeldBack: a measure is past what holds a run back.
        InputError: there is no earlier data where it was said to be.
    """
    config = run.config
    if config.drift.against is None:
        run.folder.remove(DRIFT)
        return
    found = compare_drift(config.drift.against, config.manifest or config.shards, config.drift.thresholds)
    is_new = run.folder.find(DRIFT) != found
    run.folder.write(DRIFT, found)
    if is_new and found.verdict != "ok":
        tables.show_drift(found)
    if found.verdict == "hold":
        reasons = "; ".join(found.reasons[:_REASONS_SHOWN])
        path = run.folder.path / DRIFT.name
        raise HeldBack(f"the data has drifted from {config.drift.against}: {reasons}; see {path}")
