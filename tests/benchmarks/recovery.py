"""How soon does a run train again after a SIGKILL, and what do checkpoints cost?

One run of the whole embedded model on two ranks, one of them killed three times; and one checkpoint of the default
adapter, timed against steps of the default batch.
"""

import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.ingestion import DataConfig, prepare
from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.base_model import EMBEDDED, BaseModelConfig
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from pipeline.training.callbacks import RunCallbacks
from pipeline.training.config import TrainingConfig
from pipeline.training.loop import Trainer, TrainingJob
from pipeline.world import World
from tests.benchmarks.timing import hardware, row, versions
from tests.pipeline.training.running_job import RunningJob, prepare_ground, write_config

KILLS, TIMED_STEPS = 3, 3


def training_again(root: Path) -> list[float]:
    """Return, for each kill, the seconds until all ranks began to train once more."""
    seconds = []
    prepare_ground(root)
    config = write_config(root, "killed", EMBEDDED, max_steps=40, checkpoint_steps=1, micro_batch_size=8)
    with RunningJob(config) as job:
        for _ in range(KILLS):
            begun = job.begun()
            job.await_step(1, job.step_of(1) + 1, wait_s=300)
            pid, killed = job.rank_pid(1), time.time()
            os.kill(pid, signal.SIGKILL)
            again, _ = job.await_restart(begun or job.begun())
            seconds.append(again - killed)
    return seconds


def saving(root: Path) -> tuple[float, float, int, int]:
    """Return the seconds of one checkpoint and of one step, the checkpoint's bytes, and the trained parameters."""
    data = DataConfig(synthetic=SyntheticAdsConfig(rows_per_day=12, days=4))
    prepare(data, synthetic_ads_tasks(), root, seed=0)
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    config = TrainingConfig(num_workers=1, max_steps=TIMED_STEPS)
    world = World(0, 1)
    job = TrainingJob(root / "manifest.json", synthetic_ads_tasks(), BaseModelConfig(), AdapterConfig(), config, 0)
    with RunCallbacks(root, world, 600) as callbacks:
        trainer = Trainer(job, world, callbacks, root / "checkpoints")
        start = time.perf_counter()
        trainer.run()  # its last step saves once, which warms the disk up
        step_s = (time.perf_counter() - start) / TIMED_STEPS
        times = []
        for step in range(10, 15):
            start = time.perf_counter()
            trainer._save(step)
            times.append(time.perf_counter() - start)
    trained = sum(p.numel() for p in trainer.adapter.parameters() if p.requires_grad)
    size = sum(p.stat().st_size for p in trainer.checkpoints.folder(14).rglob("*") if p.is_file())
    return statistics.median(times), step_s, size, trained


def run() -> dict[str, Any]:
    """Return the table."""
    with tempfile.TemporaryDirectory() as folder:
        again = training_again(Path(folder))
        saved_s, step_s, size, trained = saving(Path(folder) / "saving")
    share = saved_s / (TrainingConfig().checkpoint_steps * step_s)
    return {
        "question": __doc__.split("\n")[0],
        "hardware": hardware(),
        "versions": versions("torch", "deepspeed", "ray"),
        "rows": [
            row(
                "s from kill -9 of a rank to training again, slowest of 3, SmolLM2-135M",
                "<= 20",
                max(again),
                max(again) <= 20,
            ),
            row("share of the time that saving takes at the default interval", "<= 0.02", share, share <= 0.02),
            row(f"s a checkpoint takes, {trained / 1e6:.1f} M trained parameters", "-", saved_s, None),
            row("bytes a checkpoint holds for each trained parameter", "<= 17", size / trained, size / trained <= 17),
        ],
        "kill_to_training_s": [round(each, 1) for each in again],
        "step_s": round(step_s, 2),
        "not_measured": "a checkpoint on a network file system; ranks on several machines",
    }
