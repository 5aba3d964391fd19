"""One rank of a run whose memory is watched: loading, then steps and checkpoints.

``python -m tests.benchmarks.large_worker JOB``: the job is pickled; a line ``RESULT {...}`` tells bytes and losses.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

from tests.benchmarks.training_worker import Callbacks
from tests.memory import Peak, anonymous_bytes


def _most_resident() -> int:
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Train what the file of the first argument says, and tell."""
    from pipeline.modeling.base_model import load_tokenizer
    from pipeline.training.engine import join_process_group
    from pipeline.training.loop import Trainer
    from pipeline.world import World

    file = Path(sys.argv[1])
    job = pickle.loads(file.read_bytes())
    join_process_group()
    load_tokenizer(job.base)
    peak, floor = Peak(), anonymous_bytes()
    host, world = Callbacks(), World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    trainer = Trainer(job, world, host, file.parent / f"checkpoints-{file.stem}")
    found = {"floor": floor, "loading": peak.take() - floor, "loaded": anonymous_bytes() - floor}
    frozen = [p for p in trainer.adapter.base_model.parameters() if not p.requires_grad]
    found["frozen"] = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in frozen)
    trainer.run()
    found |= {"training": peak.take() - floor, "resident": _most_resident()}
    print("RESULT", json.dumps({**found, "rank": world.rank, "losses": [row["loss"] for row in host.rows]}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # threads of the process group that are left may abort the interpreter's end


if __name__ == "__main__":
    main()
