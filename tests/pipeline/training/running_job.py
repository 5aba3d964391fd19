"""The command ``mtl-lora train`` as a real process, watched from outside through what it writes, and its ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from pipeline.ingestion import DataConfig, prepare
from pipeline.stream import MixedStream
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from tests.pipeline.training.ranks import tiny_base
from tests.processes import kill_tree

SEED, BATCH = 3, 16


def prepare_ground(root: Path) -> None:
    """Put a small base model and shards of synthetic data into a folder of runs."""
    tiny_base(root / "base", width=256)
    data = DataConfig(synthetic=SyntheticAdsConfig(rows_per_day=24))
    prepare(data, synthetic_ads_tasks(), root / "shards", seed=0)


def write_config(run_root: Path, name: str, base: str = "", manifest: str = "", **training: Any) -> Path:
    """Write the configuration of a run on :func:`prepare_ground`'s data and model, unless others are named.

    It has two ranks, 16 steps, a checkpoint every 4 of them and a history row every one.
    """
    common = {
        "num_workers": 2,
        "zero_stage": 2,
        "global_batch_size": BATCH,
        "micro_batch_size": 4,
        "max_steps": 16,
        "checkpoint_steps": 4,
        "log_steps": 1,
        "learning_rate": 1e-2,
        "ledger": True,
        "max_failures": 50,
    }
    values = {
        "name": name,
        "run_root": str(run_root),
        "seed": SEED,
        "manifest": manifest or str(run_root / "shards"),
        "model": {"base": base or str(run_root / "base"), "dtype": "float32"},
        "adapter": {"r": 4},
        "training": common | training,
    }
    path = run_root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class RunningJob:
    """One process of the command and the ranks that it makes; ended, with all of them, at the block's end.

    Args:
        config: what :func:`write_config` wrote.
        overrides: of its values.
        address: the cluster, of which the process then is a driver; empty: it submits the job to a cluster of its own.
        prefix: what the command is run by.
    """

    def __init__(self, config: Path, *overrides: str, address: str = "", prefix: tuple[str, ...] = ()) -> None:
        values = yaml.safe_load(config.read_text())
        self.folder = Path(values["run_root"]) / values["name"]
        self.steps = values["training"]["max_steps"]
        self.log = config.with_suffix(".log")
        environment = {**os.environ, "RAY_ADDRESS": address, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment |= {"MTL_LORA_MESSAGE_TOKEN": "", "PYTHONUNBUFFERED": "1"}
        if address:  # as the driver of a job that someone submitted there
            environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = "{}"
        else:
            del environment["RAY_ADDRESS"]
        command = [*prefix, sys.executable, "-m", "jobs.cli", "train", "--config", str(config), *overrides]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill_everything()

    def kill_everything(self) -> None:
        """SIGKILL the command and every process under it: with a local cluster, the whole cluster."""
        kill_tree(self.process)
        for rank in (0, 1):
            with contextlib.suppress(AssertionError, ProcessLookupError):
                os.kill(self.rank_pid(rank, wait_s=0), signal.SIGKILL)

    def _part(self, rank: int) -> Path:
        return self.folder / f".samples-rank-{rank:05d}.jsonl"

    def rank_pid(self, rank: int, wait_s: float = 120) -> int:
        """Return the process of a rank: the one that has the rank's ledger open for writing."""
        part = str(self._part(rank))

        def holder() -> int | None:
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if any(file.path == part for file in process.open_files()):
                        return process.pid
            return None

        return self.wait_for(holder, f"no process of rank {rank}", wait_s)

    def step_of(self, rank: int) -> int:
        """Return the last step in a rank's ledger, -1 before the first."""
        if not self._part(rank).is_file():
            return -1
        lines = [line for line in self._part(rank).read_text().split("\n")[:-1] if line]
        return json.loads(lines[-1])["step"] if lines else -1

    def await_step(self, rank: int, step: int, wait_s: float = 300) -> int:
        """Wait until a rank has trained on a step or a later one; return which."""

        def reached() -> int | None:
            found = self.step_of(rank)
            return found + 1 if found >= step else None

        return self.wait_for(reached, f"rank {rank} did not reach step {step}", wait_s) - 1

    def wait_for(self, ask: Callable[[], int | None], otherwise: str, wait_s: float) -> int:
        """Ask again and again until there is an answer."""
        end = time.monotonic() + wait_s
        while True:
            found = ask()
            if found:
                return found
            assert time.monotonic() < end, f"{otherwise} in {wait_s} s: {self.tail()}"
            assert wait_s == 0 or self.process.poll() is None, f"{otherwise}, the command has ended: {self.tail()}"
            time.sleep(0.02)

    def signal_rank(self, rank: int, number: int, step: int) -> float:
        """Send a signal to a rank once it has trained on a step; return when, on the monotonic clock."""
        self.await_step(rank, 0)
        process = self.rank_pid(rank)  # looked up first, which takes longer than a step
        self.await_step(rank, step)
        os.kill(process, number)
        return time.monotonic()

    def begun(self) -> int:
        """Return what changes whenever ranks begin to train: the identity of the history's file, 0 without one."""
        path = self.folder / "history.jsonl"
        return path.stat().st_ino if path.is_file() else 0

    def await_restart(self, begun_before: int, wait_s: float = 300) -> tuple[float, int]:
        """Wait until ranks begin to train once more; return when, on the wall clock, and from which step."""
        self.wait_for(lambda: int(self.begun() not in (0, begun_before)), "training did not begin again", wait_s)
        rows = history(self.folder)
        return (self.folder / "history.jsonl").stat().st_mtime, rows[-1]["step"] if rows else 0

    def await_progress(self, after: int, wait_s: float = 300) -> float:
        """Wait until a step beyond ``after`` stands in the history; return when, on the monotonic clock."""

        def beyond() -> int | None:
            rows = history(self.folder)
            return 1 if rows and rows[-1]["step"] > after else None

        self.wait_for(beyond, f"no step after {after}", wait_s)
        return time.monotonic()

    def end(self, timeout_s: float = 300) -> int:
        """Wait for the command's end and return its exit code."""
        return self.process.wait(timeout_s)

    def tail(self) -> str:
        """Return the end of the command's output."""
        return self.log.read_text(errors="replace")[-4000:]


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a run's history."""
    path = folder / "history.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def adapter_bytes(folder: Path) -> bytes:
    """Return the tensors' file of a finished run."""
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def ledger_is_the_global_order(folder: Path, steps: int) -> bool:
    """Whether the merged ledger holds every sample of every step once, in the stream's order."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    stream = MixedStream(folder.parent / "shards", SEED, BATCH)
    expected = [key for step in range(steps) for key in stream.global_batch(step)]
    return [f"{row['task']}/{row['key']}" for row in rows] == expected
