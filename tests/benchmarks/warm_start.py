"""How many steps does a champion save the week after, against an adapter trained from scratch on the same data?

Three weeks of synthetic Ads data with drift make the champion. On the fourth week's data one run begins with it and one
with a fresh adapter; the loss on the days after that week is taken again and again.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline.ingestion import DataConfig, prepare
from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.modeling.packing import Example, micro_batches
from pipeline.stream import read_split
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from pipeline.training.config import TrainingConfig
from pipeline.training.loop import Trainer, TrainingJob
from pipeline.world import World
from tests.benchmarks.timing import hardware, row, versions

START = dt.date(2026, 1, 5)
ADS = SyntheticAdsConfig(start=START, rows_per_day=24, drift=1.0)
PAST, WEEK, HOLDOUT = (0, 20), (21, 27), (28, 30)
EVERY, EPOCHS = 6, 2.0


class _Host:
    """Surroundings that ask for nothing."""

    def started(self, *_: Any) -> None:
        pass

    def stops(self) -> bool:
        return False

    def log(self, *_: Any) -> None:
        pass

    def trained_on(self, *_: Any) -> None:
        pass


def _prepare(folder: Path, **days: tuple[int, int]) -> Path:
    windows = {
        split: (START + dt.timedelta(days=first), START + dt.timedelta(days=last))
        for split, (first, last) in days.items()
    }
    prepare(DataConfig(synthetic=ADS, windows=windows), synthetic_ads_tasks(), folder, seed=0)
    return folder / "manifest.json"


def _trainer(manifest: Path, folder: Path, epochs: float, champion: Path | None) -> Trainer:
    config = TrainingConfig(
        num_workers=1, global_batch_size=16, learning_rate=0.003, max_steps=None, epochs=epochs, warm_start=champion
    )
    job = TrainingJob(
        manifest, synthetic_ads_tasks(), BaseModelConfig(dtype="float32"), AdapterConfig(), config, seed=0
    )
    return Trainer(job, World(0, 1), _Host(), folder)


@torch.no_grad()
def _loss(trainer: Trainer, examples: list[Example]) -> float:
    trainer.adapter.eval()
    total = 0.0
    for part in micro_batches(examples, 2048):
        batch = trainer.encoder.collate([examples[i] for i in part])
        total += float(trainer.engine(batch)[1].sum())
    trainer.adapter.train()
    return total / len(examples)


def curve(manifest: Path, folder: Path, champion: Path | None) -> list[tuple[int, float]]:
    """Train on the week and return the loss on the days after it, before the first step and after every few."""
    trainer = _trainer(manifest, folder, EPOCHS, champion)
    examples = trainer.encoder.encode(list(read_split(manifest, "test")))
    found = [(0, _loss(trainer, examples))]
    trainer.adapter.train()
    for step in range(trainer.num_steps):
        trainer._train_step(step, trainer.stream.samples(step, World(0, 1)))
        if (step + 1) % EVERY == 0 or step + 1 == trainer.num_steps:
            found.append((step + 1, _loss(trainer, examples)))
            print(json.dumps(found[-1]), flush=True)
    return found


def run() -> dict[str, Any]:
    """Train the champion, then both."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        champion = root / "champion"
        trainer = _trainer(_prepare(root / "past", train=PAST), root / "past-checkpoints", 1.0, None)
        trainer.run()
        trainer.adapter.save_pretrained(champion)
        week = _prepare(root / "week", train=WEEK, test=HOLDOUT)
        scratch = curve(week, root / "scratch", None)
        warm = curve(week, root / "warm", champion)
    steps, loss = min(scratch, key=lambda point: point[1])
    as_good = next((step for step, value in warm if value <= loss), None)
    share = float("inf") if as_good is None else as_good / steps
    return {
        "question": __doc__.split("\n")[0],
        "command": "python -m tests.benchmarks warm_start",
        "hardware": hardware(),
        "versions": versions("torch", "deepspeed"),
        "protocol": (
            f"SmolLM2-135M fp32, synthetic Ads data, {ADS.rows_per_day} rows a task a day, drift {ADS.drift:g}; "
            f"champion: one epoch of days {PAST[0]} to {PAST[1]}; both: {EPOCHS:g} epochs of days {WEEK[0]} to "
            f"{WEEK[1]} in the same order, 16 rows a step; mean loss on all rows of days {HOLDOUT[0]} to {HOLDOUT[1]}"
        ),
        "rows": [
            row(
                "steps from the champion to the lowest loss from scratch, over the steps from scratch",
                "<= 0.5",
                share,
                share <= 0.5,
                scratch_steps=steps,
                scratch_loss=loss,
                warm_steps=as_good,
                warm_lowest_loss=min(value for _, value in warm),
            )
        ],
        "curves": {"scratch": scratch, "warm": warm},
        "not_measured": "replay of older days, real data, other rates of drift",
    }
