"""One rank of short runs, one after the other: ``kept_worker.py FOLDER MANIFEST RUNS``, the runs as JSON.

Each run trains in ``FOLDER/NAME`` on its base, adapted in the upper layers alone, up to the step at which it is told to
stop; where it names ``kept``, states are kept in that folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.synthetic import synthetic_ads_tasks
from pipeline.training.config import TrainingConfig
from pipeline.training.loop import Trainer, TrainingJob
from pipeline.world import World


class Callbacks:
    """Told to stop once so many steps are done."""

    def __init__(self, folder: Path, stop: int | None) -> None:
        self.folder, self.stop = folder, stop
        self.done = 0

    def started(self, step: int, num_steps: int) -> None:
        self.done = step

    def stops(self) -> bool:
        self.done += 1
        return self.done == self.stop

    def log(self, row: dict[str, object]) -> None:
        with (self.folder / "history.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def trained_on(self, step: int, rank: int, samples: object) -> None:
        raise AssertionError("the ledger is off")


def main() -> None:
    torch.set_num_threads(1)
    parent, manifest = map(Path, sys.argv[1:3])
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    for run in json.loads(sys.argv[3]):
        folder = parent / run["name"]
        folder.mkdir(exist_ok=True)
        settings: dict[str, Any] = {
            "global_batch_size": 8,
            "micro_batch_tokens": 150,
            "epochs": 2.0,
            "checkpoint_steps": 1000,
            "log_steps": 1,
            "learning_rate": 1e-2,
            **run.get("training", {}),
        }
        job = TrainingJob(
            manifest_path=manifest,
            tasks=synthetic_ads_tasks(),
            base=BaseModelConfig(base=run["base"], dtype="float32", max_length=96),
            adapter=AdapterConfig(r=2, lora_dropout=0.1, layers_to_transform=run["layers"]),
            training=TrainingConfig(**settings),
            seed=run.get("seed", 3),
        )
        trainer = Trainer(job, world, Callbacks(folder, run.get("stop")), folder / "checkpoints")
        trainer.run()
        assert trainer.frozen is not None
        if (kept := trainer.frozen.kept) is not None:
            told = {"read": kept.count_read, "missed": kept.count_missed, "damaged": kept.damaged}
            (folder / f"kept-{world.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
