"""One input of a run, as it is found, shown and digested."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.ingestion.images import ARCHIVE

SYNTHETIC = "synthetic_ads"
"""``data.source`` whose records are made, and the first part of the names of what is made."""


@dataclass(frozen=True)
class SourceFile:
    """One input: a file of records, one day of a synthetic task, or the images beside records."""

    task: str
    """Task of its records; ``*`` where each names its own."""
    split: str
    location: str
    """Local path or ``s3://`` URL."""
    name: str
    """The location relative to the configured root: what is shown and digested."""
    day: str | None = None
    size: int = 0
    keep: float = 1.0
    """Share of its records that is taken, the others being left out before anything else."""
    digest: str = ""
    """sha256 of a local file's content, ETag of one on S3; of a local tar the time of its last change."""

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
