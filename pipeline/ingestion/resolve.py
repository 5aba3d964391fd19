"""Between the passes: which valid rows are kept, judged over all units of a task in bounded memory.

Rows are judged in buckets of their text digests, so that equal texts meet in one bucket and a bucket fits in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion.config import DataConfig
from pipeline.ingestion.scan import Scanned, read_rows

KEEP, DUPLICATE, OVERLAP, CONFLICT, SEEN, UNSAMPLED = range(6)
REASONS = {
    DUPLICATE: "texts and label stand in an earlier record",
    OVERLAP: "texts stand in train and in another split",
    CONFLICT: "label differs from other records of the same texts",
    SEEN: "texts stand in an earlier partition",
}
RENAMED = 0x80
"""Flag on a kept row: another record of its task and split has its key."""
BUCKET_ROWS = 1 << 20
CHUNK_ROWS = 1 << 18


@dataclass
class Earlier:
    """What partitions prepared before hold, by task: digests of texts (as two words) and of keys by split."""

    digests: dict[str, np.ndarray] = field(default_factory=dict)
    keys: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)


class Decisions:
    """One byte a row, unit by unit."""

    def __init__(self, scanned: Sequence[Scanned]) -> None:
        self.scanned = scanned
        self.of = {unit.number: np.zeros(unit.rows, dtype=np.uint8) for unit in scanned}

    def counts(self, work: Path, task: int, name: str) -> dict[tuple[str, int], int]:
        """Return (split, decision) → rows of a task."""
        found: dict[tuple[str, int], int] = {}
        for unit, start, rows in _chunks(work, self.scanned, task, name):
            codes = self.of[unit.number][start : start + len(rows)][rows["task"] == task] & ~np.uint8(RENAMED)
            for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
                place = (unit.split, int(code))
                found[place] = found.get(place, 0) + int(count)
        return found


TellApart = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""Returns rows of a task (first) with digests that agree only where texts and images do, given the earlier digests."""


def resolve(
    config: DataConfig,
    tasks: Sequence[TaskSpec],
    scanned: Sequence[Scanned],
    work: Path,
    seed: int,
    earlier: Earlier,
    tell_apart: TellApart | None = None,
) -> Decisions:
    """Decide about every row: what repeats, leaks or contradicts goes, then the sample is drawn."""
    decisions = Decisions(scanned)
    for number, task in enumerate(tasks):
        name = task.name
        # Several texts may be right answers to one question: they contradict nothing.
        rules = config.model_copy(update={"conflicts": "keep"}) if task.kind == "generation" else config
        total = sum(unit.tasks.get(name, 0) for unit in scanned)
        buckets = 1 << max(total // BUCKET_ROWS, 0).bit_length()
        seen = earlier.digests.get(name, np.zeros((0, 2), dtype=np.uint64))
        for rows in _buckets(work, scanned, number, name, "digest", buckets):
            rows = tell_apart(number, rows, seen) if tell_apart else rows
            _apply(decisions, rows, judge(rows, rules, seen))
        _rename(decisions, work, number, name, buckets, earlier)
        _sample(decisions, config, work, number, name, seed)
    return decisions


def check_left(config: DataConfig, tasks: Sequence[str], decisions: Decisions, work: Path) -> None:
    """Refuse data of which the rule on overlap leaves nothing: the same file stands as two splits.

    Raises:
        InputError: a task has lost all valid records of a split in this way.
    """
    for number, name in enumerate(tasks):
        counts = decisions.counts(work, number, name)
        for split in sorted({split for split, _ in counts}):
            lost = counts.get((split, OVERLAP), 0)
            if lost and not counts.get((split, KEEP)):
                total = sum(rows for (of, _), rows in counts.items() if of == split)
                raise InputError(
                    f"task {name!r}: split {split!r} must keep some records, data.overlap = {config.overlap!r} takes "
                    f"out those whose texts stand in another split, too, here {lost} of {total}: is one file given as "
                    "both? Name another one in data.files, or set data.overlap to keep"
                )


def _chunks(work: Path, scanned: Sequence[Scanned], task: int, name: str) -> Iterator[tuple[Scanned, int, np.ndarray]]:
    for unit in scanned:
        if unit.tasks.get(name):
            for start in range(0, unit.rows, CHUNK_ROWS):
                yield unit, start, read_rows(work, unit.number, start, CHUNK_ROWS)


_BUCKET = np.dtype(
    [
        ("high", "<u8"),
        ("low", "<u8"),
        ("label", "<f8"),
        ("split", "<i2"),
        ("unit", "<u4"),
        ("row", "<u8"),
    ]
)


def _buckets(
    work: Path, scanned: Sequence[Scanned], task: int, name: str, by: str, buckets: int
) -> Iterator[np.ndarray]:
    """Yield the rows of a task in buckets of their digests, each in source order; split -1 is train.

    One pass over all units fills a file a bucket: reading the units anew for each would take a time that grows with the
    square of the rows.
    """
    splits = {split: n for n, split in enumerate(sorted({unit.split for unit in scanned} - {"train"}))} | {"train": -1}
    with tempfile.TemporaryDirectory(dir=work, prefix="buckets-") as folder:
        files = [Path(folder) / str(bucket) for bucket in range(buckets)]
        for unit, start, rows in _chunks(work, scanned, task, name):
            mine = np.flatnonzero(rows["task"] == task)
            words = _words(rows, by)[mine]
            bucket = words[:, 0] % np.uint64(buckets)
            order = np.argsort(bucket, kind="stable")
            part = np.zeros(len(mine), dtype=_BUCKET)
            part["high"], part["low"] = words[order, 0], words[order, 1]
            part["label"], part["split"] = rows["label"][mine[order]], splits[unit.split]
            part["unit"], part["row"] = unit.number, mine[order] + start
            ends = np.searchsorted(bucket[order], np.arange(buckets, dtype=np.uint64), side="right")
            for path, stretch in zip(files, np.split(part, ends[:-1]), strict=True):
                with path.open("ab") as file:  # as many as there are buckets may not be open at a time
                    stretch.tofile(file)
        for path in files:
            if path.is_file():
                yield np.fromfile(path, dtype=_BUCKET)
                path.unlink()


def _words(rows: np.ndarray, by: str) -> np.ndarray:
    if by == "digest":
        return np.ascontiguousarray(rows["digest"]).view("<u8").reshape(-1, 2)
    return np.stack([rows["key"], np.zeros(len(rows), dtype=np.uint64)], axis=1)


def _apply(decisions: Decisions, rows: np.ndarray, codes: np.ndarray) -> None:
    for unit, mine in _by_unit(rows):
        decisions.of[unit][rows["row"][mine].astype(np.int64)] |= codes[mine]


def _by_unit(rows: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Yield each unit in a bucket and where its rows stand, which is in one stretch."""
    starts = np.flatnonzero(np.diff(rows["unit"].astype(np.int64), prepend=-1))
    for start, stop in pairwise(np.append(starts, len(rows)).tolist()):
        yield int(rows["unit"][start]), slice(start, stop)


def judge(rows: np.ndarray, config: DataConfig, seen: np.ndarray) -> np.ndarray:
    """Return a decision for each row of a bucket, in source order.

    A text that stands in train and another split goes from one of them; then, in train, contradicting labels are
    settled; then all but the first of equal texts and labels go. What an earlier partition holds goes first of all.
    """
    codes = np.zeros(len(rows), dtype=np.uint8)
    if len(seen):
        _mark_seen(codes, rows, seen)
    group = _groups(rows)
    train = rows["split"] == -1
    number = int(group.max()) + 1 if len(group) else 0

    def any_in_group(mask: np.ndarray) -> np.ndarray:
        flags = np.zeros(number, dtype=bool)
        flags[group[mask]] = True
        return flags[group]

    if config.overlap != "keep":
        alive = codes == KEEP
        leaking = any_in_group(train & alive) & any_in_group(~train & alive) & alive
        codes[leaking & (train if config.overlap == "drop_train" else ~train)] = OVERLAP
    if config.conflicts != "keep":
        _settle_conflicts(codes, rows, group, train & (codes == KEEP), config.conflicts)
    if config.duplicates == "drop":
        alive = np.flatnonzero(train & (codes == KEEP))
        codes[alive[_repeated(group[alive], rows["label"][alive])]] = DUPLICATE
    return codes


def _repeated(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return whether each pair stands at an earlier place, too."""
    order = np.lexsort((second, first))  # stable, and several times faster than numpy.unique of rows
    again = np.zeros(len(order), dtype=bool)
    again[order[1:]] = (first[order][1:] == first[order][:-1]) & (second[order][1:] == second[order][:-1])
    return again


def _groups(rows: np.ndarray) -> np.ndarray:
    """Return the number of each row's text among the distinct texts."""
    order = np.lexsort((rows["low"], rows["high"]))
    high, low = rows["high"][order], rows["low"][order]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    group = np.empty(len(rows), dtype=np.int64)
    group[order] = np.cumsum(new) - 1
    return group


def _mark_seen(codes: np.ndarray, rows: np.ndarray, seen: np.ndarray) -> None:
    candidates = np.flatnonzero(np.isin(rows["high"], seen[:, 0]))
    near = seen[np.isin(seen[:, 0], rows["high"][candidates])]  # a tuple takes several times a row's memory
    known = set(map(tuple, near.tolist()))
    for place in candidates:
        if (int(rows["high"][place]), int(rows["low"][place])) in known:
            codes[place] = SEEN


def _settle_conflicts(codes: np.ndarray, rows: np.ndarray, group: np.ndarray, alive: np.ndarray, policy: str) -> None:
    places = np.flatnonzero(alive)
    if len(places) == 0:
        return
    order = places[np.argsort(group[places], kind="stable")]
    labels, groups = rows["label"][order], group[order]
    starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
    lowest, highest = np.minimum.reduceat(labels, starts), np.maximum.reduceat(labels, starts)
    ends = np.append(starts[1:], len(order))
    for at in np.flatnonzero(lowest != highest):
        mine, found = order[starts[at] : ends[at]], labels[starts[at] : ends[at]]
        values, counts = np.unique(found, return_counts=True)
        winner = None
        if policy == "first":
            winner = found[0]
        elif policy == "majority" and (counts == counts.max()).sum() == 1:
            winner = values[counts.argmax()]
        codes[mine[found != winner] if winner is not None else mine] = CONFLICT


def _rename(decisions: Decisions, work: Path, task: int, name: str, buckets: int, earlier: Earlier) -> None:
    """Flag kept rows whose key stands in an earlier kept row of the task and split."""
    splits = sorted({unit.split for unit in decisions.scanned} - {"train"})
    taken = {-1: earlier.keys.get((name, "train"))} | {n: earlier.keys.get((name, s)) for n, s in enumerate(splits)}
    for rows in _buckets(work, decisions.scanned, task, name, "key", buckets):
        kept = np.zeros(len(rows), dtype=bool)
        for unit, mine in _by_unit(rows):
            kept[mine] = decisions.of[unit][rows["row"][mine].astype(np.int64)] == KEEP
        rows = rows[kept]
        again = _repeated(rows["high"], rows["split"])
        for split, keys in taken.items():
            if keys is not None:
                again |= (rows["split"] == split) & np.isin(rows["high"], keys)
        _apply(decisions, rows, np.where(again, RENAMED, 0).astype(np.uint8))


def _sample(decisions: Decisions, config: DataConfig, work: Path, task: int, name: str, seed: int) -> None:
    """Keep at most ``max_samples`` of each split: those of the smallest pseudo-random number of their place."""
    for split, wanted in config.max_samples.items():
        units = [unit for unit in decisions.scanned if unit.split == split]
        draws, places = [], []
        for unit, start, rows in _chunks(work, units, task, name):
            codes = decisions.of[unit.number][start : start + len(rows)]
            kept = np.flatnonzero((rows["task"] == task) & (codes & ~np.uint8(RENAMED) == KEEP))
            draws.append(_mix((kept + start).astype(np.uint64), seed * 1_000_003 + unit.number))
            places.append((unit.number, kept + start))
        found = np.concatenate(draws) if draws else np.zeros(0, dtype=np.uint64)
        if len(found) <= wanted:
            continue
        limit = np.partition(found, wanted)[wanted]
        for (number, rows_kept), values in zip(places, draws, strict=True):
            decisions.of[number][rows_kept[values >= limit]] = UNSAMPLED


def _mix(values: np.ndarray, seed: int) -> np.ndarray:
    """Return a 64-bit hash of each value (SplitMix64, Steele et al. 2014, doi:10.1145/2714064.2660195)."""
    z = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed * 0xD1342543DE82EF95 & 0xFFFFFFFFFFFFFFFF)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
