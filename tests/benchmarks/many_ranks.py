"""Does what one rank pays for the order of the samples stay small with a thousand ranks?

Each rank of N computes which samples of a step are its own, 8 of 8·N; where lengths are grouped, it sorts the samples
of all ranks in a window of 64 steps.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.stream import LengthGrouping, MixedStream
from pipeline.world import World
from tests.benchmarks.scale import write_huge_manifest
from tests.benchmarks.timing import hardware, row, versions

SHARDS, ROWS, STEPS, WINDOWS = 20_000, 8, 64, 3
RANKS = (2, 8, 64, 1024)
GOAL = 1.2
PLAIN, GROUPED = "plain order", "lengths grouped over 64 steps"


def rank_ms(manifest: Path, ranks: int, grouping: LengthGrouping | None) -> dict[str, float]:
    """Return the processor time in ms in which a rank opens the stream, and that of a step's plan: the median of the
    windows after the first, which reads the indexes of the shards."""
    start = time.process_time()
    stream, world = MixedStream(manifest, 0, ROWS * ranks, length_grouping=grouping), World(ranks // 2, ranks)
    opened = time.process_time() - start
    plans = []
    for window in range(WINDOWS + 1):
        start = time.process_time()
        for step in range(window * STEPS, (window + 1) * STEPS):
            assert len(stream.rank_places(step, world)) == ROWS
        plans.append((time.process_time() - start) / STEPS)
    return {"start_ms": round(opened * 1e3, 1), "step_ms": round(statistics.median(plans[1:]) * 1e3, 3)}


def run() -> dict[str, Any]:
    """Measure one rank of each world, one after another."""
    before = hardware()
    with tempfile.TemporaryDirectory() as name:
        write_huge_manifest(Path(name), SHARDS)
        orders = {PLAIN: None, GROUPED: LengthGrouping(window_steps=STEPS)}
        found = {
            order: {ranks: rank_ms(Path(name), ranks, grouping) for ranks in RANKS}
            for order, grouping in orders.items()
        }
    rows = []
    for order, by_ranks in found.items():
        for what in ("start_ms", "step_ms"):
            most, least = by_ranks[RANKS[-1]][what], by_ranks[RANKS[0]][what]
            ratio = most / least
            name = "opening the stream" if what == "start_ms" else "a step's plan"
            told = row(f"{order}: {name}, rank of 1,024 over rank of 2", f"<= {GOAL}", ratio, ratio <= GOAL)
            rows.append(told | {"measured": {f"{ranks} ranks": ms[what] for ranks, ms in by_ranks.items()}})
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks many_ranks",
        "hardware": before,
        "versions": versions("numpy", "pyarrow"),
        "protocol": f"{SHARDS:,} shards of 10,000 samples; {ROWS} samples a rank and step; processor time in ms",
        "rows": rows,
        "not_measured": "a thousand processes: what Ray, the rendezvous and the network add",
    }
