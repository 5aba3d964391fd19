"""Kill each rank and the driver with SIGKILL at 5 steps of a run, under ZeRO 1, 2 and 3, and see what comes out.

``python -m tests.benchmarks.kill_matrix [STAGE VICTIM]``: one row of cells or, without arguments, all nine. A row is
one run of 16 steps with a checkpoint every 4, in which the victim dies 5 times; the finished adapter is compared bit by
bit with the unbroken run's, the ledger with the stream's global order. The table goes to ``results/kill_matrix.json``.
It is no part of the benchmarks that run by default: it takes some 20 minutes on two cores.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.contracts import write_atomic
from tests.benchmarks.timing import hardware
from tests.pipeline.training.running_job import (
    RunningJob,
    adapter_bytes,
    history,
    ledger_is_the_global_order,
    prepare_ground,
    write_config,
)

TABLE = Path(__file__).parent / "results" / "kill_matrix.json"
STEPS = 16
KILLED_AFTER = (1, 4, 7, 10, 13)
VICTIMS = ("rank 0", "rank 1", "driver")


def row_of_cells(root: Path, address: str, stage: int, victim: str) -> dict[str, Any]:
    """Return one run's cells: the step after which the victim died, where training went on, and how soon it did."""
    whole = _unbroken(root, address, stage)
    name = f"zero{stage}-{victim.replace(' ', '')}"
    config = write_config(root, name, zero_stage=stage)
    cells = []
    job = RunningJob(config, address=address)
    try:
        for step in KILLED_AFTER:
            reached = job.await_step(0, step)
            begun, killed = job.begun(), time.time()
            if victim == "driver":
                os.kill(job.process.pid, signal.SIGKILL)
                job.process.wait()
                job = RunningJob(config, address=address)
            else:
                os.kill(job.rank_pid(int(victim[-1])), signal.SIGKILL)
            again, start = job.await_restart(begun)
            cells.append({"killed_after": reached, "went_on_from": start, "training_again_s": round(again - killed, 1)})
        code = job.end()
    finally:
        job.__exit__()
    finished = code == 0
    return {
        "zero_stage": stage,
        "victim": victim,
        "cells": cells,
        "finished": finished,
        "adapter_bit_identical": finished and adapter_bytes(job.folder) == adapter_bytes(whole),
        "losses_identical": [r["loss"] for r in history(job.folder)] == [r["loss"] for r in history(whole)],
        "ledger_each_sample_once": finished and ledger_is_the_global_order(job.folder, STEPS),
    }


def _unbroken(root: Path, address: str, stage: int) -> Path:
    folder = root / f"zero{stage}-whole"
    if not (folder / "adapter").is_dir():
        with RunningJob(write_config(root, folder.name, zero_stage=stage), address=address) as job:
            code = job.end()
            if code:
                raise RuntimeError(f"the unbroken run ended with code {code}: {job.tail()}")
    return folder


def main(arguments: list[str]) -> None:
    """Run the rows asked for and put them into the table, in the place of older ones."""
    from ray.cluster_utils import Cluster

    asked = [(int(arguments[0]), arguments[1])] if arguments else [(s, v) for s in (1, 2, 3) for v in VICTIMS]
    known = json.loads(TABLE.read_text())["rows"] if TABLE.is_file() else []
    rows = {(row["zero_stage"], row["victim"]): row for row in known}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepare_ground(Path(folder))
            for stage, victim in asked:
                rows[stage, victim] = row_of_cells(Path(folder), cluster.address, stage, victim)
                print(json.dumps(rows[stage, victim]), flush=True)
                table = {
                    "question": __doc__.split("\n")[0],
                    "hardware": hardware(),
                    "rows": [rows[k] for k in sorted(rows)],
                }
                write_atomic(TABLE, json.dumps(table, indent=1) + "\n")
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
