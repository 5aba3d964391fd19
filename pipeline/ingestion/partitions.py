"""Daily partitions: which days have arrived whole, and which of them a retraining reads.

A partition is a folder ``ROOT/DATE`` with a file a task and, written last, a marker that says it is whole.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError
from pipeline.ingestion.sources import SUFFIXES
from pipeline.storage import exists, filesystem, is_remote, join, stamp_of

COMPLETE = "_SUCCESS"
_DAY = dt.timedelta(days=1)
_READ = 1 << 20


@dataclass(frozen=True)
class Partition:
    """One day of records.

    Args:
        day: its date, which is the folder's name.
        files: names of the record files in it.
        size: their bytes, compressed as they are.
        whole: whether the marker is there.
    """

    day: dt.date
    files: tuple[str, ...]
    size: int
    whole: bool


@dataclass(frozen=True)
class Window:
    """The days that one retraining reads; first and last day, both included.

    Args:
        train: new days to train on.
        holdout: the newest days, on which champion and challenger are scored; the next retraining trains on them.
        replay: older days of which a share is mixed in; None for none.
    """

    train: tuple[dt.date, dt.date]
    holdout: tuple[dt.date, dt.date]
    replay: tuple[dt.date, dt.date] | None = None


def find_partitions(root: str, complete_file: str | None = COMPLETE) -> list[Partition]:
    """Return the partitions under a folder or URL, by day.

    Args:
        root: what holds the folders named by date.
        complete_file: name of the marker; None takes every partition as whole.

    Raises:
        InputError: there is no such folder, or no partition in it.
    """
    fs, path = filesystem(root)
    found = []
    for entry in fs.ls(path, detail=False) if exists(fs, path) else ():
        day = _date(posixpath.basename(str(entry).rstrip("/")))
        if day is None:
            continue
        files = {posixpath.basename(str(f["name"])): int(f["size"] or 0) for f in fs.ls(entry, detail=True)}
        records = tuple(sorted(name for name in files if name.endswith(SUFFIXES)))
        whole = complete_file is None or complete_file in files
        found.append(Partition(day, records, sum(files[name] for name in records), whole))
    if not found:
        raise InputError(
            f"data.root must hold daily partitions DATE/TASK.jsonl.gz, found none in {root}; bring one or fix the path"
        )
    return sorted(found, key=lambda partition: partition.day)


def digest_partitions(root: str, partitions: Sequence[Partition]) -> dict[str, str]:
    """Return a short digest of each day's content: of the bytes locally, of names, sizes and versions elsewhere."""
    digests = {}
    for partition in partitions:
        digest = hashlib.sha256()
        for name in partition.files:
            place = join(root, partition.day.isoformat(), name)
            digest.update(name.encode())
            if is_remote(place):
                fs, path = filesystem(place)
                info = fs.info(path)
                digest.update(f"{info['size']}{info.get('ETag') or stamp_of(info)}".encode())
            else:
                with Path(place).open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        digests[partition.day.isoformat()] = digest.hexdigest()[:16]
    return digests


def plan_window(
    partitions: Sequence[Partition],
    trained_until: dt.date | None,
    *,
    as_of: dt.date,
    holdout_days: int = 1,
    window_days: int | None = None,
    replay_days: int = 0,
    known_gaps: Sequence[dt.date] = (),
) -> Window | None:
    """Return the days to read: a pure function of the partitions and of how far the champion was trained.

    Each day is trained on once: the new days but the newest ``holdout_days``, which are trained on the next time.

    Args:
        partitions: what is there, by day.
        trained_until: the last day that the champion was trained on; None without a champion.
        as_of: days after it are not looked at.
        holdout_days: newest days kept for scoring.
        window_days: most days of a first window; later windows take all that is new.
        replay_days: days before the new ones that may be replayed.
        known_gaps: days that are known to be missing for good.

    Returns:
        None where no new day is left to train on.

    Raises:
        InputError: a day between is missing, or is not whole though a later one is.
    """
    seen = {partition.day: partition for partition in partitions if partition.day <= as_of}
    whole = [day for day, partition in seen.items() if partition.whole]
    new = sorted(day for day in whole if trained_until is None or day > trained_until)
    if trained_until is None and window_days is not None:
        new = new[-window_days - holdout_days :]
    if len(new) <= holdout_days:
        return None
    start = new[0] if trained_until is None else trained_until + _DAY
    days = [start + n * _DAY for n in range((new[-1] - start).days + 1)]
    missing = [day for day in days if day not in whole and day not in set(known_gaps)]
    if missing:
        half = [day.isoformat() for day in missing if day in seen]
        raise InputError(
            f"partitions must follow each other day by day, got none or no whole one for "
            f"{[day.isoformat() for day in missing][:7]} between {start} and {new[-1]}"
            + (f" ({half} are still being written)" if half else "")
            + "; bring them, or name days that will never come in retraining.known_gaps"
        )
    holdout, train = new[-holdout_days:], new[:-holdout_days]
    older = [day for day in whole if train[0] - replay_days * _DAY <= day < train[0]] if replay_days else []
    replay = (min(older), max(older)) if older else None
    return Window((train[0], train[-1]), (holdout[0], holdout[-1]), replay)


def check_clock(partitions: Sequence[Partition], today: dt.date) -> None:
    """Refuse partitions of days that have not come yet: either they or the clock are wrong.

    Raises:
        InputError: there is one, more than a day ahead (time zones).
    """
    ahead = [partition.day.isoformat() for partition in partitions if partition.day > today + _DAY]
    if ahead:
        raise InputError(
            f"partitions must not lie in the future, got {ahead[:3]} while this machine's clock says {today}; "
            "set the clock, or rename the partitions"
        )


def _date(name: str) -> dt.date | None:
    try:
        return dt.date.fromisoformat(name) if len(name) == 10 else None
    except ValueError:
        return None
