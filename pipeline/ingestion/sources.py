"""The inputs of a run: which files, of which task and split, and their digests."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import posixpath
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.contracts import TaskSpec, write_atomic
from pipeline.errors import InputError, did_you_mean
from pipeline.ingestion.config import ANY_TASK, DataConfig, days_of
from pipeline.ingestion.images import ARCHIVE
from pipeline.ingestion.source_file import SYNTHETIC, SourceFile
from pipeline.ingestion.synthetic_source import synthetic_sources
from pipeline.json_text import parse_json
from pipeline.schemes import scheme_of
from pipeline.storage import exists, filesystem, is_remote, join, stamp_of, url_of

SUFFIXES = (".jsonl.gz", ".jsonl", ".json.gz", ".json", ".csv.gz", ".csv", ".parquet")
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""Splits of the default layout, each with the names that its file may bear."""
_MAGIC = re.compile(r"[*?\[]")


def find_sources(config: DataConfig, tasks: Sequence[TaskSpec]) -> list[SourceFile]:
    """Return the inputs in a fixed order, without their digests.

    Raises:
        InputError: a file is missing, a glob matches nothing, or a task is unknown.
    """
    names = [task.name for task in tasks]
    if config.source == SYNTHETIC:
        return synthetic_sources(config, names)
    for name in config.files:
        if name not in names and name != ANY_TASK:
            raise InputError(f"data.files must name configured tasks, got {name!r}{did_you_mean(name, names)}")
    if ANY_TASK in config.files or (not config.files and _has_mixed_files(config)):
        names = [ANY_TASK]
    found = []
    for name in names:
        if name in config.files:
            for split, candidates in _candidates(config, name).items():
                found += _expand(config, name, split, candidates)
        elif config.windows:
            for split, window in config.windows.items():
                found += _partitions(config, name, split, window)
        else:
            found += _in_layout(config, name)
        if config.replay is not None and name not in config.files:
            older = _partitions(config, name, "train", config.replay.window, late=True)
            found += [replace(source, keep=config.replay.share) for source in older]
    return found


def find_archives(config: DataConfig, tasks: Sequence[TaskSpec], sources: Sequence[SourceFile]) -> list[SourceFile]:
    """Return the ``images.zip`` beside each record file of a task with images, each once, without their digests."""
    with_images = {name for task in tasks if task.image_field is not None for name in (task.name, ANY_TASK)}
    found: dict[str, SourceFile] = {}
    for source in sources:
        location = posixpath.join(posixpath.dirname(source.location), ARCHIVE)
        if source.is_synthetic or location in found or source.task not in with_images:
            continue
        fs, path = filesystem(location)
        if exists(fs, path):
            found[location] = _described(config, source.task, source.split, fs, path, location)
    return list(found.values())


def _has_mixed_files(config: DataConfig) -> bool:
    fs, path = filesystem(str(config.root))
    return any(exists(fs, f"{path.rstrip('/')}/train{suffix}") for suffix in SUFFIXES)


def _candidates(config: DataConfig, task: str) -> dict[str, list[str]]:
    """Return for each split the places that ``data.files`` names."""
    if config.source == "webdataset":
        from pipeline.ingestion.tar_writer import expand_braces  # webdataset brings torch, which takes seconds

        return {split: expand_braces(pattern) for split, pattern in config.files[task].items()}
    return {split: [pattern] for split, pattern in config.files[task].items()}


def _in_layout(config: DataConfig, task: str) -> list[SourceFile]:
    """Return a task's files in the default layout, by split; in each folder the first ending that is there is taken."""
    heads = [""] if task == ANY_TASK else [f"{task}/", f"*/{task}/"]
    root = str(config.root or ".").rstrip("/")
    fs, path = filesystem(root)
    scheme = scheme_of(root)
    if scheme is None or scheme.is_listed:
        there = [_matches(fs, f"{path}/{head}*") for head in heads]
    else:  # what a folder holds is not told there, so each name is asked for
        names = [f"{path}/{heads[0]}{stem}{end}" for stems in SPLITS.values() for stem in stems for end in SUFFIXES]
        there = [[name for name in names if exists(fs, name)]]
    found = []
    for split, stems in SPLITS.items():
        named = [[f for f in files if _stem(f) in stems and f.endswith(SUFFIXES)] for files in there]
        every = [f for files in named for f in files]
        if len({_stem(match) for match in every}) > 1:
            raise InputError(
                f"split {split!r} of task {task!r} must have one name of {list(stems)}, found {every}; name one in "
                f"data.files.{task}.{split}"
            )
        alike = ([f for f in files if f.endswith(end)] for files in named for end in SUFFIXES)
        matches = next(filter(None, alike), [])
        if len(matches) > 1:
            raise InputError(
                f"task {task!r} must stand in one folder of {config.root}, found it in {matches}; name the one in "
                f"data.root, or the files in data.files.{task}"
            )
        if not matches and split == "train":
            wanted = [f"{head}{split}{end}" for head in heads for end in SUFFIXES]
            beside = [f for files in there for f in files if _stem(f).lower() == split]
            raise InputError(_none_found(config, task, split, wanted, beside))
        found += [_source(config, task, split, fs, match, root) for match in matches]
    return found


def _stem(path: str) -> str:
    return posixpath.basename(path).partition(".")[0]


def _none_found(config: DataConfig, task: str, split: str, wanted: Sequence[str], beside: Sequence[str] = ()) -> str:
    other = (
        f", but {list(beside)}, whose name or ending is none of these: unpack, convert or rename it;" if beside else ";"
    )
    return (
        f"task {task!r} must have its {split} records in {config.root or '.'}, found none of {list(wanted)}{other} "
        f"put the file there or name it in data.files.{task}.{split}"
    )


def _expand(config: DataConfig, task: str, split: str, candidates: list[str]) -> list[SourceFile]:
    """Return the files of a split: those of the first candidate that is there; of tars, those of every one."""
    if config.source == "webdataset" and len(candidates) > 1:
        return [source for candidate in candidates for source in _expand(config, task, split, [candidate])]
    for candidate in candidates:
        alone = candidate.startswith("/") or is_remote(candidate)
        location = candidate if alone else join(config.root or ".", candidate)
        fs, path = filesystem(location)
        matches = _matches(fs, path)
        if matches:
            return [_source(config, task, split, fs, match, location) for match in matches]
    raise InputError(_none_found(config, task, split, candidates))


def _matches(fs: Any, path: str) -> list[str]:
    """Return the files that a path or glob names; what is there by its very name is no glob, folders included."""
    if not _MAGIC.search(path) or exists(fs, path):
        return [path] if exists(fs, path) else []
    parts = path.split("/")
    literal = 0
    for at, part in enumerate(parts[:-1], 1):
        if _MAGIC.search(part) and not exists(fs, "/".join(parts[:at])):
            break
        literal = at
    if not _MAGIC.search("/".join(parts[literal:])):
        return []
    folder = [_MAGIC.sub(r"[\g<0>]", part) for part in parts[:literal]]
    return sorted(fs.glob("/".join([*folder, *parts[literal:]])))


def _partitions(
    config: DataConfig, task: str, split: str, window: tuple[dt.date, dt.date], late: bool = False
) -> list[SourceFile]:
    """Return a task's files in a window of days; a task may begin inside it, with ``late`` after it."""
    found: list[SourceFile] = []
    missing: list[str] = []
    for day in days_of(window):
        if day in config.gaps:
            continue
        place = join(config.root or ".", day.isoformat())
        fs, path = filesystem(place)
        match = next((f"{path}/{task}{s}" for s in SUFFIXES if exists(fs, f"{path}/{task}{s}")), None)
        if match is None and (found or split != "train"):
            missing.append(day.isoformat())
        elif match is None:
            continue
        else:
            found.append(_source(config, task, split, fs, match, place, day.isoformat()))
    if missing or not (found or late):
        missing = missing or [day.isoformat() for day in days_of(window)]
        raise InputError(
            f"data.windows.{split} must name days that have {config.root}/DATE/{task}.jsonl.gz, "
            f"missing {len(missing)}: {missing[:5]}; narrow the window or bring the partitions"
        )
    return found


def _source(
    config: DataConfig, task: str, split: str, fs: Any, path: str, location: str, day: str | None = None
) -> SourceFile:
    if config.source == "webdataset":
        if not path.endswith(".tar"):
            raise InputError(
                f"a shard must be a plain .tar, whose samples can be read at any place, got {path!r}; unpack a "
                "compressed one with gunzip"
            )
    elif not path.endswith(SUFFIXES):
        raise InputError(f"a record file must end in one of {SUFFIXES}, got {path!r}; rename or convert it")
    return _described(config, task, split, fs, path, location, day)


def _described(
    config: DataConfig, task: str, split: str, fs: Any, path: str, location: str, day: str | None = None
) -> SourceFile:
    info = fs.info(path)
    found = url_of(location, path)
    root = str(Path(config.root).resolve()) if config.root and not is_remote(config.root) else config.root
    shown = str(Path(found).resolve()) if not is_remote(found) else found
    name = shown.removeprefix(f"{root}/") if root else found
    # A local file is digested by its content; of a tar the index has a checksum of each sample.
    version = stamp_of(info) if is_remote(found) or config.source == "webdataset" else ""
    return SourceFile(task, split, found, name, day, int(info["size"]), digest=version)


def with_digests(sources: Sequence[SourceFile], folder: Path) -> list[SourceFile]:
    """Return the inputs with their content digests; those of unchanged files are remembered in the folder."""
    memory = folder / ".digests.json"
    known: dict[str, str] = parse_json(memory.read_text()) if memory.is_file() else {}
    found, result = {}, []
    for source in sources:
        if not source.is_synthetic and not source.digest:
            status = Path(source.location).stat()
            place = f"{Path(source.location).resolve()}:{status.st_size}:{status.st_mtime_ns}"
            digest = known.get(place) or _sha256(Path(source.location))
            found[place] = digest
            source = SourceFile(**{**asdict(source), "digest": digest})
        result.append(source)
    if found and found != known and folder.is_dir():
        write_atomic(memory, json.dumps(found))
    return result


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
