"""One input of a run, as it is found, shown and digested, and one record of it as found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.ingestion.images import ARCHIVE
from pipeline.ingestion.tar_records import TarSample

MAX_LINE_BYTES = 4 << 20
"""Longest record of a file: a longer one is rejected without being held in memory."""
SYNTHETIC = "synthetic_ads"
"""``data.source`` whose records are made, and the first part of the names of what is made."""


@dataclass(frozen=True)
class SourceFile:
    """One input: a file of records, one day of a synthetic task, or the images beside records."""

    task: str
    """Task of its records; ``*`` where each names its own."""
    split: str
    location: str
    """Local path or URL."""
    name: str
    """The location relative to the configured root: what is shown and digested."""
    day: str | None = None
    size: int = 0
    keep: float = 1.0
    """Share of its records that is taken, the others being left out before anything else."""
    digest: str = ""
    """sha256 of a local file's content; of a remote file and of a tar what storage calls its version (ETag, time)."""

    @property
    def is_synthetic(self) -> bool:
        """Whether the records are made, not read."""
        return self.location.startswith(f"{SYNTHETIC}/")

    @property
    def is_tar(self) -> bool:
        """Whether it is a shard that others wrote, which stays where it is."""
        return self.location.endswith(".tar")

    @property
    def is_archive(self) -> bool:
        """Whether it holds the images of the records beside it, and no records."""
        return self.location.endswith(f"/{ARCHIVE}")


class Line(NamedTuple):
    """One record as found; ``error`` where it could not be read."""

    number: int
    """Line or row number within the unit, from 1; of a CSV row over several lines the first one."""
    place: int
    """A number that tells it from the other records of its source, however the source is cut into units."""
    record: dict[str, Any]
    error: str | None = None
    sample: TarSample | None = None
    """Where it stands in a tar that others wrote."""
