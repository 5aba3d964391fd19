"""One rank of short runs, one after the other: ``resume_worker.py FOLDER MANIFEST BASE RUN:STAGE:DTYPE:STOP ...``.

A run named ``texts…`` or ``images…`` has the tasks of ``FOLDER/tasks.json`` and is validated; others have those of the
synthetic ads. One named ``…_kept`` keeps states beside, one named ``…_anew`` would
and has no room for any.

Each run trains in ``FOLDER/RUN`` from its newest checkpoint to the step STOP, at which its last rank is told to stop.
After ``--`` come the runs of a further folder, in the same form: a process starts more slowly than it trains.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from pipeline.contracts import TaskSpec
from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.modeling.config import KeptStatesConfig
from pipeline.synthetic import synthetic_ads_tasks
from pipeline.training.config import TrainingConfig, ValidationConfig
from pipeline.training.loop import Trainer, TrainingJob
from pipeline.world import World

STEPS = 4


class Callbacks:
    """Told to stop on the last rank alone, once so many steps are done."""

    def __init__(self, folder: Path, world: World, stop: int) -> None:
        self.folder, self.world, self.stop = folder, world, stop
        self.done = 0

    def started(self, step: int, num_steps: int) -> None:
        self.done = step

    def stops(self) -> bool:
        self.done += 1
        return self.world.rank == self.world.num_ranks - 1 and self.done == self.stop

    def log(self, row: dict[str, object]) -> None:
        with (self.folder / "history.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def trained_on(self, step: int, rank: int, samples: object) -> None:
        raise AssertionError("the ledger is off")


def read_tasks(path: Path) -> tuple[TaskSpec, ...]:
    return tuple(TaskSpec.model_validate(task) for task in json.loads(path.read_text()))


def train(folder: Path, manifest: Path, base: Path, runs: Sequence[str]) -> None:
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    for run in runs:
        name, stage, dtype, stop = run.split(":")
        room = {"kept": 1 << 30, "anew": 1}.get(name.rpartition("_")[2])
        kept = KeptStatesConfig(folder=str(folder / f"states_{room}"), max_bytes=room) if room else None
        writes = name.startswith(("texts", "images"))
        (folder / name).mkdir(exist_ok=True)
        job = TrainingJob(
            manifest_path=manifest,
            tasks=read_tasks(folder / "tasks.json") if writes else synthetic_ads_tasks(),
            base=BaseModelConfig(base=str(base), dtype=dtype),  # type: ignore[arg-type]
            # an odd rank, which two processes do not divide: ZeRO pads their parts
            adapter=AdapterConfig(r=3, lora_dropout=0.0 if "elastic" in name else 0.1),
            training=TrainingConfig(
                zero_stage=int(stage),  # type: ignore[arg-type]
                global_batch_size=8,
                micro_batch_size=4,
                max_steps=STEPS,
                checkpoint_steps=100,
                log_steps=1,
                learning_rate=1e-2,
                kept_states=kept,
                validation=ValidationConfig(every_steps=2, split="test", samples_per_task=5) if writes else None,
            ),
            seed=3,
        )
        finished = Trainer(job, world, Callbacks(folder / name, world, int(stop)), folder / name / "checkpoints").run()
        assert finished == (int(stop) == STEPS)


def main() -> None:
    for is_end, group in groupby(sys.argv[1:], key="--".__eq__):
        if not is_end:
            folder, manifest, base, *runs = group
            train(Path(folder), Path(manifest), Path(base), runs)


if __name__ == "__main__":
    main()
