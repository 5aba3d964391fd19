"""Do memory and start-up stay small with millions of records in, and with 100,000 shards of 10⁹ samples?

The records that are prepared are a million by default; ``MTL_LORA_BENCH_RECORDS=10000000`` runs the full size.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.contracts import Sample, ShardManifest
from pipeline.ingestion.shards import write_shard
from pipeline.shard_index import index_path
from tests.benchmarks.ingestion import TASK, tasks
from tests.benchmarks.timing import hardware, row, versions

SHARDS, SAMPLES_A_SHARD = 100_000, 10_000
RECORDS = int(os.environ.get("MTL_LORA_BENCH_RECORDS", "1000000"))
FULL_RECORDS = 10_000_000
LINKS_A_FILE = 20_000
"""File systems allow some 65,000 hard links to a file."""
GIB = 2**30

PEAK = """
import json, sys, time
from pathlib import Path
def done(**found):
    # Not ru_maxrss: a child begins with its parent's.
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    found["peak_bytes"] = int(peak.split()[1]) * 1024
    print(json.dumps(found))
"""
_PREPARE = (
    PEAK
    + """
from pipeline.ingestion import prepare
from tests.benchmarks.ingestion import config_of, tasks
start = time.perf_counter()
manifest = prepare(config_of(Path(sys.argv[1])), tasks(), Path(sys.argv[2]), 0)
done(seconds=time.perf_counter() - start, samples=sum(shard.samples for shard in manifest.shards))
"""
)
STREAM = (
    PEAK
    + """
from pipeline.stream import MixedStream
from pipeline.world import World
start = time.perf_counter()
stream = MixedStream(sys.argv[1], 0, 256)
assert len(stream.samples(0, World(0, 1))) == 256
first = time.perf_counter() - start
start = time.perf_counter()
stream = MixedStream(sys.argv[1], 0, 256)
assert len(stream.samples(stream.steps_per_epoch // 2, World(0, 1))) == 256
done(first_s=first, resume_s=time.perf_counter() - start, samples=stream.num_samples)
"""
)


def measured(script: str, *arguments: str) -> dict[str, Any]:
    output = subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
    return found


def write_many(root: Path, records: int) -> None:
    """Write short records into JSONL files of a million each."""
    (root / TASK).mkdir(parents=True)
    for first in range(0, records, 1_000_000):
        with (root / TASK / f"{first:09d}.jsonl").open("w") as file:
            for number in range(first, min(first + 1_000_000, records)):
                record = {"id": f"r{number}", "query": f"query {number}", "title": "a title", "text": "a text"}
                file.write(json.dumps({**record, "label": number % 2}) + "\n")


def write_huge_manifest(folder: Path, count: int = SHARDS) -> None:
    """Write a manifest of so many shards of 10,000 samples, which are hard links to few."""
    shards = []
    for number in range(count):
        if number % LINKS_A_FILE == 0:
            samples = (
                Sample(key=f"r{n}", task=TASK, fields={"query": f"q {n}", "title": "a", "text": "b"}, label=n % 2)
                for n in range(SAMPLES_A_SHARD)
            )
            first = write_shard(folder, TASK, "train", number, samples)
            shards.append(first)
            continue
        name = f"{TASK}-train-{number:06d}.tar"
        os.link(folder / first.path, folder / name)
        os.link(folder / index_path(first.path), folder / index_path(name))
        shards.append(first.model_copy(update={"path": name}))
    ShardManifest(tasks=tuple(tasks()), shards=tuple(shards), source_sha256="0").write(folder / "manifest.json")


def run() -> dict[str, Any]:
    """Measure peak memory and times, each in a process of its own."""
    before = hardware()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "huge").mkdir()
        write_huge_manifest(folder / "huge")
        stream = measured(STREAM, str(folder / "huge"))
        write_many(folder / "in", RECORDS)
        prepared = measured(_PREPARE, str(folder / "in"), str(folder / "out"))
    records, stream_gib = prepared["peak_bytes"] / GIB, stream["peak_bytes"] / GIB
    fits = records <= 1 if RECORDS >= FULL_RECORDS else None
    rate = RECORDS / prepared["seconds"]
    shards = f"{SHARDS:,} shards, {stream['samples']:,} samples"
    return {
        "question": __doc__,
        "hardware": before,
        "versions": versions("pydantic", "numpy", "webdataset"),
        "rows": [
            row(f"memory in GiB, {RECORDS:,} records in", "<= 1", records, fits),
            row(f"records/s, {RECORDS:,} in, 1 process", "reported", rate, None),
            row(f"memory in GiB, {shards}", "<= 1", stream_gib, stream_gib <= 1),
            row("first batch of it, in s", "<= 5", stream["first_s"], stream["first_s"] <= 5),
            row("resume at the middle of its epoch, in s", "<= 5", stream["resume_s"], stream["resume_s"] <= 5),
        ],
        "not_measured": "distinct shards: the 100,000 are hard links to five, so caches of the disk help",
    }
