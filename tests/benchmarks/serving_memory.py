"""The part of the serving benchmark on memory: ``score`` on millions of rows with a model that answers at once."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.serving_load import private_mib
from tests.benchmarks.timing import row
from tests.processes import kill_tree

NULL_ROWS, NULL_FILES = int(os.environ.get("MTL_LORA_BENCH_ROWS", "5000000")), 20
_ROW_GROUP = 50_000

_NULL = """
import sys
from pipeline.orchestration.cluster import cluster
from pipeline.orchestration.config import RayConfig
from pipeline.serving.batch import ScoringJob, score_files
from tests.pipeline.serving import null_model
with cluster(RayConfig(address="local")):
    score_files(ScoringJob("null", null_model.load, null_model.TASKS, sys.argv[1], sys.argv[2]))
"""


def score_memory() -> list[dict[str, Any]]:
    """``score`` on millions of rows with a model that answers at once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        for number in range(NULL_FILES):
            _write_null_rows(folder / f"in/{number:03d}.parquet", number)
        begun = time.perf_counter()
        running = subprocess.Popen([sys.executable, "-c", _NULL, f"{folder}/in", f"{folder}/out"], stdout=sys.stderr)
        try:
            ours, rays = _peaks(running)
        finally:
            kill_tree(running)
        seconds = time.perf_counter() - begun
        manifest = json.loads((folder / "out/_manifest.json").read_text())
    if manifest["rows"] != NULL_ROWS:
        raise RuntimeError(f"every row must be scored once, {manifest['rows']} of {NULL_ROWS} are")
    gib = ours / 1024
    return [
        row(
            f"score, {NULL_ROWS:,} rows: GiB of driver, readers and actors at their peak",
            "<= 1.5",
            gib,
            gib <= 1.5,
            beside_daemons_gib=round(rays / 1024, 3),
        ),
        row(
            f"score, {NULL_ROWS:,} rows of a null model: rows a second, start included", "-", NULL_ROWS / seconds, None
        ),
    ]


def _write_null_rows(path: Path, number: int) -> None:
    """Write a file of rows for the null model, a row group at a time."""
    count = NULL_ROWS // NULL_FILES
    with pq.ParquetWriter(path, pa.schema([(name, pa.string()) for name in ("id", "task", "text")])) as writer:
        for first in range(0, count, _ROW_GROUP):
            rows = range(first, min(first + _ROW_GROUP, count))
            texts = [f"query {i} of a length like those that are asked {'x' * (i % 40)}" for i in rows]
            writer.write_table(
                pa.table({"id": [f"{number}-{i}" for i in rows], "task": ["clicks"] * len(rows), "text": texts})
            )


def _peaks(running: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Return the peak in MiB of what works, and of Ray's own daemons, until a process ends."""
    ours = rays = 0.0
    while running.poll() is None:
        working, daemons = 0.0, 0.0
        try:
            family = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
        except psutil.Error:
            break
        for member in family:
            try:
                title = " ".join(member.cmdline())
            except psutil.Error:
                continue
            if member.pid == running.pid or title.startswith("ray::"):
                working += private_mib(member)
            else:
                daemons += private_mib(member)
        ours, rays = max(ours, working), max(rays, daemons)
        time.sleep(0.5)
    if running.returncode:
        raise RuntimeError(f"score must end well, got exit code {running.returncode}")
    return ours, rays
