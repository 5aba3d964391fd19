"""One rank of a run whose memory is watched: loading, then steps and checkpoints.

``python -m tests.benchmarks.large_worker JOB``: the job is pickled; a line ``RESULT {...}`` tells bytes and losses.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.training_worker import Callbacks
from tests.memory import Peak, anonymous_bytes


def _most_resident() -> int:
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def _scales(parameter: Any) -> int:
    """Return the bytes of what turns codes of 4 bit into values; those of 8 bit are a few a matrix."""
    state = getattr(parameter, "quant_state", None)
    return 0 if state is None else state.absmax.nbytes + state.state2.absmax.nbytes


def _held(model: Any) -> int:
    """Return the bytes of a base's frozen tensors that this process holds, its own part and what is gathered."""
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            part = getattr(parameter, "ds_tensor", None)
            total += parameter.numel() * parameter.element_size()
            total += 0 if part is None else part.numel() * part.element_size()
    return total


def main() -> None:
    """Train what the file of the first argument says, and tell."""
    from pipeline.heap import returned_when_freed
    from pipeline.modeling.base_model import load_base, load_tokenizer, resolve_dtype
    from pipeline.training.engine import gathered_layer_by_layer, join_process_group, partitioned_loading
    from pipeline.training.loop import Trainer
    from pipeline.world import World

    file = Path(sys.argv[1])
    job = pickle.loads(file.read_bytes())
    join_process_group()
    load_tokenizer(job.base)
    host, world = Callbacks(), World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    peak, floor = Peak(), anonymous_bytes()
    is_half = resolve_dtype(job.base.dtype) is torch.bfloat16
    with returned_when_freed(), partitioned_loading(job.training, is_half):
        base = load_base(job.base, asking=gathered_layer_by_layer)
    found = {"loading": peak.take() - floor, "loaded": anonymous_bytes() - floor}
    found["frozen"] = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() + _scales(p) for p in base.parameters())
    trainer = Trainer(job, world, host, file.parent / f"checkpoints-{file.stem}", base)
    most = Peak(lambda: _held(base))
    trainer.run()
    found |= {"held": most.take(), "training": peak.take() - floor, "resident": _most_resident()}
    print("RESULT", json.dumps({**found, "rank": world.rank, "losses": [row["loss"] for row in host.rows]}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # threads of the process group that are left may abort the interpreter's end


if __name__ == "__main__":
    main()
