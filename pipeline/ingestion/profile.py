"""What a preparation's data looks like, in a few numbers a task: what drift is measured against."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field

from pipeline.adopted_sample import adopted_texts, tar_reader
from pipeline.contracts import Contract, Sample, ShardManifest
from pipeline.ingestion.resolve import REASONS
from pipeline.ingestion.scan import Scanned
from pipeline.json_text import parse_json
from pipeline.shard_index import ShardIndex, index_path
from pipeline.validate import Checked

PROFILE = "profile.json"
SAMPLES = 2000
"""Samples read a task, evenly spaced."""
_WORD = re.compile(r"\w+")
_LENGTH_EDGES = [round(2 ** (k / 2)) for k in range(4, 28)]


class TaskProfile(Contract):
    """One task in one preparation."""

    samples: int
    label_counts: dict[str, int]
    rejected_share: float
    """Invalid records as a share of all read; repeated, leaking and contradicting ones are not invalid."""
    scanned: int = 0
    """Records read, with those that were put aside or not drawn."""
    length_counts: tuple[int, ...]
    """Histogram of the texts' characters; each bin is half an octave wide."""
    mean_length: float
    words: tuple[int, ...]
    """CRC-32 of the words seen in the samples read, sorted; not the words themselves."""
    word_counts: tuple[int, ...]
    novelty: float
    """Share of the second half's words that the first half lacks: what is new without any drift."""


class DataProfile(Contract):
    """``profile.json`` beside the manifest."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    split: str
    samples_read: int
    """At most so many a task."""
    tasks: dict[str, TaskProfile]

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def profile_data(
    folder: Path, manifest: ShardManifest, scanned: Mapping[str, int], split: str = "train"
) -> DataProfile:
    """Read some samples of each task that has any in the split and return what they look like.

    ``scanned`` has the number of records that each task's samples were taken from.
    """
    tasks = {}
    for task in manifest.tasks:
        total = manifest.samples_of(task.name, split)
        if not total:
            continue
        labels = Counter[str]()
        for shard in manifest.shards_of(task.name, split):
            labels.update(shard.label_counts)
        rejects = [r for r in manifest.rejected if (r.task, r.split) == (task.name, split)]
        invalid = sum(r.records for r in rejects if r.reason not in REASONS.values())
        samples = _some(folder, manifest, task.name, split, total)
        tasks[task.name] = profile_texts(
            (" ".join((*sample.fields.values(), *sample.choices)) for sample in samples),
            samples=total,
            label_counts=dict(labels),
            rejected_share=invalid / scanned[task.name],
            scanned=scanned[task.name],
        )
    return DataProfile(split=split, samples_read=SAMPLES, tasks=tasks)


def profile_texts(texts: Iterable[str], **known: Any) -> TaskProfile:
    """Return what texts look like, one a sample, with what else is known of their task."""
    lengths, seen = [], (Counter[str](), Counter[str]())
    for number, text in enumerate(texts):
        lengths.append(len(text))
        # Alternating halves, so that an order within the data does not count as novelty.
        seen[number % 2].update(_WORD.findall(text))
    halves = [_by_digest(found) for found in seen]
    words = halves[0] + halves[1]
    new = sum(count for word, count in halves[1].items() if word not in halves[0])
    return TaskProfile(
        length_counts=tuple(np.bincount(np.digitize(lengths, _LENGTH_EDGES), minlength=len(_LENGTH_EDGES) + 1)),
        mean_length=float(np.mean(lengths)),
        words=tuple(sorted(words)),
        word_counts=tuple(words[word] for word in sorted(words)),
        novelty=new / max(halves[1].total(), 1),
        **known,
    )


def _by_digest(words: Counter[str]) -> Counter[int]:
    found = Counter[int]()
    for word, count in words.items():
        found[zlib.crc32(word.lower().encode())] += count
    return found


def scanned_records(scanned: Sequence[Scanned], split: str = "train") -> Counter[str]:
    """Return task → records of a split, valid or not."""
    counts = Counter[str]()
    for unit in scanned:
        if unit.split == split:
            counts.update(unit.tasks)
            counts.update({task: sum(reasons.values()) for task, reasons in unit.rejects.items()})
    return counts


def scanned_before(folder: Path, manifest: ShardManifest, split: str = "train") -> Counter[str]:
    """Return task → records of a split that the shards were taken from; where no profile of them tells, at least."""
    known = DataProfile.read(folder / PROFILE).tasks if (folder / PROFILE).is_file() else {}
    counts = Counter[str]()
    for name in (task.name for task in manifest.tasks):
        samples = manifest.samples_of(name, split)
        rejected = sum(r.records for r in manifest.rejected if (r.task, r.split) == (name, split))
        profile = known.get(name)
        counts[name] = samples + rejected
        if profile is not None and profile.samples == samples:  # else a killed append has left a later one
            counts[name] = max(counts[name], profile.scanned)
    return counts


def _some(folder: Path, manifest: ShardManifest, task: str, split: str, total: int) -> Iterator[Sample | Checked]:
    wanted = np.unique(np.linspace(0, total - 1, min(total, SAMPLES)).round().astype(int))
    start = 0
    for shard in manifest.shards_of(task, split):
        rows = wanted[(wanted >= start) & (wanted < start + shard.samples)] - start
        start += shard.samples
        if not len(rows) or shard.index_sha256 is None:
            continue
        index = ShardIndex.from_bytes((folder / index_path(shard.path)).read_bytes(), shard.path)
        if shard.adopted is not None:
            with tar_reader(shard.adopted.url) as read:
                yield from adopted_texts(shard, manifest.task(task), index, rows.tolist(), read)
            continue
        with (folder / shard.path).open("rb") as file:
            for row in rows:
                file.seek(int(index.offsets[row]))
                yield Sample.model_validate(parse_json(file.read(int(index.sizes[row]))))
