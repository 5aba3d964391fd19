"""Does ingestion on two nodes take half the time of one, and does the driver stay small with 10⁸ records?

A node is a raylet with one core, in a cluster of Ray's own for tests; all reach the same folder.
``MTL_LORA_BENCH_RECORDS`` sets the larger number of records at which the driver's own part is measured.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.ingestion import prepare
from pipeline.ingestion.config import DataConfig
from pipeline.ingestion.resolve import Earlier, resolve
from pipeline.ingestion.scan import ROW, Scanned, part
from pipeline.ingestion.write import plan_writes
from pipeline.orchestration.config import RayConfig
from pipeline.orchestration.mapping import mapper
from tests.benchmarks.ingestion import TASK, config_of, tasks, write_records
from tests.benchmarks.scale import GIB, PEAK, measured
from tests.benchmarks.timing import hardware, row, versions

FILES, ROWS_A_FILE, ROUNDS = 16, 5_000, 3
SMALL, LARGE = 1_000_000, int(os.environ.get("MTL_LORA_BENCH_RECORDS", "4000000"))
RECORDS = 100_000_000
UNIT_ROWS = 1_000_000
_DRIVER = (
    PEAK
    + """
from tests.benchmarks.ingestion_nodes import driver
done(**driver(int(sys.argv[1])))
"""
)


def driver(records: int) -> dict[str, Any]:
    """Do what the driver does between and around the passes, for so many distinct records; return its seconds."""
    with tempfile.TemporaryDirectory() as name:
        work, random, scanned = Path(name), np.random.default_rng(0), []
        for number, start in enumerate(range(0, records, UNIT_ROWS)):
            count = min(UNIT_ROWS, records - start)
            rows = np.zeros(count, dtype=ROW)
            rows["key"], rows["label"] = random.integers(0, 2**63, count), random.integers(0, 2, count)
            rows["digest"] = np.frombuffer(random.bytes(16 * count), dtype="V16")
            rows.tofile(part(work, number, "rows"))
            scanned.append(Scanned(number, "train", count, count, {TASK: count}, {}, {}))
        start_s = time.perf_counter()
        decisions = resolve(DataConfig(source="records", root="."), tasks(), scanned, work, 0, Earlier())
        sources = {unit.number: "" for unit in scanned}
        jobs = sum(1 for _ in plan_writes(decisions, work, work, tasks(), sources, 10_000, {}))
        return {"seconds": time.perf_counter() - start_s, "jobs": jobs}


def seconds_on(root: Path, nodes: int) -> list[float]:
    """Return the seconds of each round on so many nodes, after one that starts their workers."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, logging_level="ERROR")
    try:
        spread = mapper(RayConfig(address=cluster.address), alone_s=0)
        seconds = []
        for _ in range(ROUNDS + 1):
            with tempfile.TemporaryDirectory(dir=root) as folder:
                start = time.perf_counter()
                prepare(config_of(root / "in"), tasks(), Path(folder), 0, mapper=spread)
                seconds.append(time.perf_counter() - start)
        return seconds[1:]
    finally:
        ray.shutdown()
        cluster.shutdown()


def run() -> dict[str, Any]:
    """Time one node and two, then the driver's own part at two sizes, each in a process of its own."""
    before = hardware()
    with tempfile.TemporaryDirectory() as name:
        write_records(Path(name) / "in", FILES, ROWS_A_FILE)
        one, two = seconds_on(Path(name), 1), seconds_on(Path(name), 2)
    found = {records: measured(_DRIVER, str(records)) for records in (SMALL, LARGE)}
    gib = {records: part["peak_bytes"] / GIB for records, part in found.items()}
    # A byte a record is all that grows: the decisions. The rest is a bucket, of a size that does not.
    whole = gib[LARGE] + (RECORDS - LARGE) / GIB
    speedup = statistics.median(one) / statistics.median(two)
    measure = "driver between the passes"
    return {
        "question": __doc__,
        "hardware": before,
        "versions": versions("ray", "numpy"),
        "records": FILES * ROWS_A_FILE,
        "seconds": {"one node": [round(s, 2) for s in one], "two nodes": [round(s, 2) for s in two]},
        "rows": [
            row("ingestion, two nodes of one core each: rate over one", ">= 1.7", speedup, speedup >= 1.7),
            *(row(f"{measure}: memory in GiB, {n:,} records", "reported", gib[n], None) for n in found),
            *(row(f"{measure}: µs a record, {n:,}", "reported", found[n]["seconds"] / n * 1e6, None) for n in found),
            row(f"{measure}: memory in GiB for {RECORDS:,} records, extrapolated", "<= 2", whole, whole <= 2),
        ],
        "not_measured": "nodes on several machines and their file system; 10⁸ records end to end",
    }
