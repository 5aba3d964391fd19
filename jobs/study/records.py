"""The records of a suite as a study takes them: few, the same for every arm, with a development part of their own.

A record is taken by the hash of its id. Tasks that ask different questions of the same records thus take the same ones,
and no record of one task's development part is trained on by another task.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.study.interference import write_suites
from jobs.study_config import StudyConfig
from pipeline.contracts import TaskSpec, write_atomic
from pipeline.errors import InputError
from pipeline.json_text import parse_json

MADE = ("offers", "review_questions", "question_kinds")
"""Suites that are made from the data."""
_DONE = "records.json"
Record = dict[str, Any]


def write_records(study: StudyConfig, suite: str, tasks: Sequence[TaskSpec], out: Path) -> Path:
    """Write ``OUT/TASK/SPLIT.jsonl.gz`` of a suite, and return the folder; what stands is not written again.

    Args:
        study: says how many, and what is done to them.
        suite: of its suites.
        tasks: of the suite.
        out: folder to write to.

    Raises:
        InputError: a task's records are not there, or too few; or labels of a task that is not binary are to be turned.
    """
    options, counts = study.suites[suite], study.samples_of(suite)
    told = json.dumps(
        [counts.model_dump(), options.train_samples, options.flipped, [task.name for task in tasks], study.data_root]
    )
    if (out / _DONE).is_file() and (out / _DONE).read_text() == told:
        return out
    source = _source(study, options.config or suite, out)
    for name in (*options.flipped, *options.train_samples):
        if name not in [task.name for task in tasks]:
            raise InputError(f"suites.{suite} must name its own tasks, got {name!r}; correct the name")
    for task in tasks:
        folder = _folder(source, task.name)
        records = sorted(_records(folder / "train.jsonl.gz"), key=_place)
        held, rest = records[: counts.validation], records[counts.validation :]
        train = rest[: options.train_samples.get(task.name, counts.train)]
        if len(held) < counts.validation or not train:
            raise InputError(
                f"task {task.name!r} must have more than samples.validation = {counts.validation} train records, got "
                f"{len(records)}; lower it"
            )
        if task.name in options.flipped:
            train = _turned(task, train, options.flipped[task.name])
        test = sorted(_records(folder / "test.jsonl.gz"), key=_place)[: counts.test]
        for split, chosen in {"train": train, "validation": held, "test": test}.items():
            _write(out / task.name / f"{split}.jsonl.gz", chosen)
    write_atomic(out / _DONE, told)
    return out


def _source(study: StudyConfig, suite: str, out: Path) -> Path:
    root = Path(study.data_root)
    if suite not in MADE or (root / suite).is_dir():
        return root
    made = out.parent / ".made"
    if not (made / "done").is_file():
        write_suites(root, made)
        write_atomic(made / "done", "")
    return made / suite


def _folder(root: Path, task: str) -> Path:
    # By depth and not by **, which passes links by.
    found = [folder for form in (task, f"*/{task}") for folder in sorted(root.glob(form)) if _has_train(folder)]
    if len(found) != 1:
        raise InputError(
            f"task {task!r} must stand once as TASK/train.jsonl.gz or SUITE/TASK/train.jsonl.gz under {root}, got "
            f"{len(found)}; name the data's folder in data_root"
        )
    return found[0]


def _has_train(folder: Path) -> bool:
    return (folder / "train.jsonl.gz").is_file()


def _records(path: Path) -> Iterator[Record]:
    if not path.is_file():
        raise InputError(f"a study reads {path}, which is not there; name the data's folder in data_root")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            yield {"id": str(number)} | parse_json(line)


def _place(record: Record) -> str:
    return hashlib.sha256(str(record["id"]).encode()).hexdigest()


def _turned(task: TaskSpec, records: Sequence[Record], share: float) -> list[Record]:
    """Return records of which the first share, in the order of a hash, has the other label."""
    if task.kind != "binary":
        raise InputError(f"flipped must name binary tasks, got {task.name!r} of kind {task.kind!r}; take it out")
    order = sorted(range(len(records)), key=lambda i: _place({"id": f"turned/{records[i]['id']}"}))
    turned = set(order[: round(share * len(records))])
    field = task.label_field
    return [{**r, field: 1 - int(r[field])} if i in turned else r for i, r in enumerate(records)]


def _write(path: Path, records: Sequence[Record]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomic(path, gzip.compress(text.encode(), mtime=0))
