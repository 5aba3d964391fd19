"""Do first batch, resume and memory of a rank stay small with 10⁶ shards of 10¹⁰ samples?"""

import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.scale import GIB, STREAM, measured, write_huge_manifest
from tests.benchmarks.timing import hardware, row, versions

SHARDS = 1_000_000


def run() -> dict[str, Any]:
    """Measure a rank that opens the manifest and reads a batch, and one that resumes, in a process of their own."""
    before = hardware()
    with tempfile.TemporaryDirectory() as name:
        write_huge_manifest(Path(name), SHARDS)
        manifest_bytes = (Path(name) / "manifest.json").stat().st_size
        found = measured(STREAM, name)
    memory = found["peak_bytes"] / GIB
    rows = [
        row("first batch, in s", "<= 10", found["first_s"], found["first_s"] <= 10),
        row("resume at the middle of the epoch, in s", "<= 10", found["resume_s"], found["resume_s"] <= 10),
        row("memory of a rank in GiB, after both", "<= 2", memory, memory <= 2),
        row("bytes of the manifest", "reported", manifest_bytes, None),
    ]
    return {
        "question": __doc__,
        "hardware": before,
        "versions": versions("numpy", "pyarrow", "pydantic"),
        "protocol": "a batch of 256; both times take in reading the manifest and looking up all shards, not imports",
        "samples": found["samples"],
        "shards": SHARDS,
        "rows": rows,
        "not_measured": "distinct shards: they are hard links to fifty; a listing of 10⁶ objects in S3",
    }
