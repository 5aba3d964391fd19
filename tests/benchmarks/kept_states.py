"""How much faster is an epoch whose states below the adapter are kept than one that computes them, to the same bits?"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.ingestion import DataConfig, prepare
from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.modeling.config import KeptStatesConfig, Precision
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from pipeline.training.config import TrainingConfig
from pipeline.training.loop import Trainer, TrainingJob
from pipeline.world import World
from tests.benchmarks.timing import hardware, row, threads, versions
from tests.benchmarks.training_worker import Callbacks
from tests.processes import free_port

BASE, LAYERS = "minilm-l6", (4, 5)
ROWS_A_DAY, BATCH, MICRO = 20, 32, 1024
GOAL = 2.5


def _trainer(folder: Path, kept: Precision | None) -> Trainer:
    """Return a trainer that computes the states below the adapter, or keeps them."""
    asked = None if kept is None else KeptStatesConfig(folder=str(folder / "states"), precision=kept)
    job = TrainingJob(
        manifest_path=folder / "manifest.json",
        tasks=synthetic_ads_tasks(),
        base=BaseModelConfig(base=BASE, dtype="float32"),
        adapter=AdapterConfig(layers_to_transform=LAYERS),
        training=TrainingConfig(
            num_workers=1, global_batch_size=BATCH, micro_batch_tokens=MICRO, epochs=2.0, kept_states=asked
        ),
        seed=0,
    )
    trainer = Trainer(job, World(0, 1), Callbacks(), folder / f"run-{kept}")
    trainer.adapter.train()
    return trainer


def _step(trainer: Trainer, step: int) -> tuple[float, float]:
    """Train one step; return its wall-clock and processor time."""
    samples = trainer.stream.samples(step, World(0, 1))
    start, cpu = time.perf_counter(), time.process_time()
    trainer._train_step(step, samples)
    return time.perf_counter() - start, time.process_time() - cpu


def _same(one: Trainer, other: Trainer) -> bool:
    """Whether losses so far and all trained values are the same bits."""
    sums = torch.equal(one.log_interval.sums_T2, other.log_interval.sums_T2)
    pairs = zip(one.adapter.parameters(), other.adapter.parameters(), strict=True)
    return sums and all(torch.equal(a, b) for a, b in pairs if a.requires_grad)


def measure() -> list[dict[str, Any]]:
    """Train the same steps by each trainer in turns, and time the second epoch's."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    with tempfile.TemporaryDirectory() as name, threads(1):
        folder = Path(name)
        prepare(
            DataConfig(synthetic=SyntheticAdsConfig(rows_per_day=ROWS_A_DAY, days=4)), synthetic_ads_tasks(), folder, 0
        )
        trainers = {mode: _trainer(folder, mode) for mode in (None, "exact", "int8")}  # type: ignore[arg-type]
        whole = _trainer(folder, None)
        whole.frozen = whole.objective.scorer.frozen = None
        every = {"computed": trainers[None], "kept": trainers["exact"], "int8": trainers["int8"], "whole": whole}
        epoch = every["kept"].stream.steps_per_epoch
        seconds: dict[str, list[list[float]]] = {mode: [[], []] for mode in every}
        for step in range(2 * epoch - 1):  # the step in which an epoch ends has samples of both
            for mode in list(every)[:: 1 if step % 2 else -1]:
                wall, _ = _step(every[mode], step)
                seconds[mode][step >= epoch].append(wall)
        is_same = _same(every["computed"], every["kept"])
        held = sum(path.stat().st_size for path in (folder / "states").glob("*/*.states"))
        samples = every["kept"].stream.epoch_samples
        kept = every["kept"].frozen.kept  # type: ignore[union-attr]
        assert kept is not None
        return _rows(seconds, is_same, held / samples, kept.count_read / max(1, kept.count_read + kept.count_missed))


def _ratio(seconds: dict[str, list[list[float]]], over: str, under: str, epoch: int = 1) -> float:
    pairs = zip(seconds[over][epoch], seconds[under][epoch], strict=True)
    return statistics.median(a / b for a, b in pairs)


def _rows(
    seconds: dict[str, list[list[float]]], is_same: bool, bytes_a_sample: float, share_read: float
) -> list[dict[str, Any]]:
    faster = _ratio(seconds, "computed", "kept")
    medians = {mode: [round(1000 * statistics.median(epoch), 1) for epoch in two] for mode, two in seconds.items()}
    return [
        row(
            "second epoch with kept states, over computing them: times faster, bit-identical",
            f">= {GOAL}, same bits",
            faster,
            faster >= GOAL and is_same,
            same_bits=is_same,
            median_step_ms_by_epoch=medians,
            read_of_both_epochs=round(share_read, 3),
        ),
        row("second epoch with states kept in 8 bit: times faster", "-", _ratio(seconds, "computed", "int8"), None),
        row("second epoch: over the model run as a whole", "-", _ratio(seconds, "whole", "kept"), None),
        row("first epoch, which keeps: times as long as computing", "-", _ratio(seconds, "kept", "computed", 0), None),
        row("bytes kept a sample, exact and in 8 bit together", "-", bytes_a_sample, None),
    ]


def run() -> dict[str, Any]:
    """Measure one process of one thread."""
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks kept_states",
        "hardware": hardware(),
        "versions": versions("torch", "deepspeed", "transformers"),
        "protocol": (
            f"MiniLM-L6 in fp32, MTL-LoRA of r = 8 on q, k, v, o of layers {LAYERS}, the top third; synthetic ads, 9 "
            f"tasks, {BATCH} samples a step, {MICRO} tokens a micro-batch, ZeRO 1, one process of one thread; four "
            "trainers take turns step by step through the same two epochs: states computed, kept exactly, kept in 8 "
            "bit, and the model run as a whole; whole training steps (tokenising, reading, forward, backward, update), "
            "medians of ratios a step; same bits: losses and all trained values after both epochs"
        ),
        "rows": measure(),
        "not_measured": "a cold disk, accelerators, more threads",
    }
