"""A look at tars that others wrote, for a first configuration: which tasks and splits they are of, and their fields."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.ingestion.tar_members import DamagedTarError, tar_members
from pipeline.ingestion.tar_records import tar_records
from pipeline.members import PICKLES, is_image, split_name

LOOKED_AT = 2000
"""Samples of a split that are looked at."""
_LONGEST_TEXT = 64 << 10
_NUMBERED = re.compile(r"(.*?)(\d+)([^\d/]*)")
_COUNT = re.compile(r"[._-]*\d*$")
_ANY_TAR = ("part", "shard", "data", "")
"""Names of tars, their numbers taken off, that say nothing of a task."""


def pattern_of(paths: Sequence[Path], root: Path) -> str:
    """Return how ``data.files`` names some tars: one by its path, several of one name that count up in braces, else a
    glob that has no others."""
    names = sorted(path.relative_to(root).as_posix() for path in paths)
    matches = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    if len(names) > 1 and len(matches) == len(names) and len({(match[1], match[3]) for match in matches}) == 1:
        head, tail, counts = matches[0][1], matches[0][3], [match[2] for match in matches]
        numbers = sorted(map(int, counts))
        if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(set(map(len, counts))) == 1:
            return f"{head}{{{min(counts)}..{max(counts)}}}{tail}"
        glob = f"{head}[0-9]*{tail}"
        if sorted(path.relative_to(root).as_posix() for path in root.glob(glob)) == names:
            return glob
    return names[0] if len(names) == 1 else f"{{{','.join(names)}}}"


def told_by(path: Path, data: Path, split: re.Pattern[str]) -> tuple[Path, str]:
    """Return the file or folder whose name tells task and split of a tar, and the name without numbers: the tar's own,
    or, where that says nothing, as that of ``TASK/train/part-000.tar``, its folder's.

    Args:
        path: of the tar.
        data: what is looked at.
        split: matches names that tell a split.
    """
    stem = _COUNT.sub("", path.name.partition(".")[0])
    stem = "" if stem.lower() in _ANY_TAR else stem
    if not split.fullmatch(stem) and path.parent != data and split.fullmatch(path.parent.name):
        return path.parent, path.parent.name
    return path, stem


def columns_of(paths: Sequence[Path]) -> tuple[int, dict[str, list[Any]], list[str]]:
    """Return how many of the first samples were looked at, field → its values, and the images that all of them have."""
    columns: dict[str, list[Any]] = {}
    images: Counter[str] = Counter()
    count = 0
    for record, found in islice(_samples(paths), LOOKED_AT):
        count += 1
        images.update(found)
        for field, value in record.items():
            columns.setdefault(field, []).append(value)
    return count, columns, [extension for extension, of in images.items() if of == count]


def _samples(paths: Sequence[Path]) -> Iterator[tuple[Mapping[str, Any], set[str]]]:
    """Yield each readable sample's texts, by field, and the extensions of its images."""
    for path in paths:
        found: dict[str, set[str]] = {}
        longest: dict[str, int] = {}
        try:
            with path.open("rb") as file:
                for member in tar_members(file, path.stat().st_size):
                    named = split_name(member.name)
                    if named is not None:
                        found.setdefault(named[0], set()).add(named[1])
                        longest[named[1]] = max(longest.get(named[1], 0), member.size)
        except DamagedTarError:
            continue
        texts = {e for e, size in longest.items() if size <= _LONGEST_TEXT and not is_image(e) and e not in PICKLES}
        for record, error, sample in tar_records(str(path), texts):
            if error is None:
                plain = {field: value for field, value in record.items() if not isinstance(value, bytes | dict)}
                yield plain, {extension for extension in found[sample.key] if is_image(extension)}
