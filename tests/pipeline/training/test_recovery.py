"""Killed, terminated and hung processes of a real run under Ray: it ends with the bits of the unbroken one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.training.running_job import (
    RunningJob,
    adapter_bytes,
    history,
    ledger_is_the_global_order,
    prepare_ground,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    prepare_ground(folder)
    return folder


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of one node that outlives its drivers."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def whole(root: Path, address: str) -> Path:
    """Folder of the unbroken run."""
    with RunningJob(write_config(root, "whole"), address=address) as job:
        assert job.end() == 0, job.tail()
    return job.folder


def _equals(folder: Path, whole: Path) -> None:
    assert adapter_bytes(folder) == adapter_bytes(whole)
    assert ledger_is_the_global_order(folder, 16)
    assert [row["loss"] for row in history(folder)] == [row["loss"] for row in history(whole)]


def test_killed_terminated_and_hung_workers(root: Path, address: str, whole: Path) -> None:
    config = write_config(root, "workers", hang_timeout_s=20, checkpoint_steps=8)
    with RunningJob(config, address=address) as job:
        job.signal_rank(0, signal.SIGTERM, 1)
        _, saved = job.await_restart(job.begun())
        assert 0 < saved < 8, job.tail()
        killed = job.signal_rank(1, signal.SIGKILL, 9)
        anew_s = job.await_progress(10) - killed  # what any loss takes here and now
        hung = job.signal_rank(1, signal.SIGSTOP, 11)
        assert job.await_progress(13) - hung < 20 + 30 + 2 * anew_s
        assert job.end() == 0, job.tail()
    assert "most recent call first" in job.log.read_text()  # where the ranks that waited for the hung one stood
    _equals(job.folder, whole)


@pytest.mark.nightly
def test_a_terminated_command_saves_and_the_same_command_goes_on(root: Path, address: str, whole: Path) -> None:
    config = write_config(root, "driver")
    with RunningJob(config) as job:  # a cluster of its own
        job.await_step(0, 2)  # with steps left when the signal arrives
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 128 + signal.SIGTERM, job.tail()
    saved = max(int(p.name[5:]) for p in (job.folder / "checkpoints").glob("step-*"))
    assert saved == history(job.folder)[-1]["step"] < 16
    with RunningJob(config, address=address) as job:
        assert job.end() == 0, job.tail()
    assert f"training goes on from step {saved} of 16" in job.log.read_text()
    _equals(job.folder, whole)


@pytest.mark.nightly
def test_a_killed_rank_on_an_encoder(root: Path, address: str) -> None:
    changes = ("model.base=minilm-l6", "model.num_layers=2", "training.max_steps=8", "training.checkpoint_steps=3")
    with RunningJob(write_config(root, "encoder-whole"), *changes, address=address) as whole:
        assert whole.end() == 0, whole.tail()
    with RunningJob(write_config(root, "encoder"), *changes, address=address) as job:
        job.signal_rank(1, signal.SIGKILL, 4)
        assert job.end() == 0, job.tail()
    assert "restart" in job.log.read_text()
    assert adapter_bytes(job.folder) == adapter_bytes(whole.folder)
    assert [row["loss"] for row in history(job.folder)] == [row["loss"] for row in history(whole.folder)]


@pytest.mark.nightly
def test_what_no_restart_can_mend_ends_the_run_at_once(root: Path, address: str) -> None:
    config = write_config(root, "burst", learning_rate=1e30, gradient_clipping=0.0, max_failures=-1)
    with RunningJob(config, address=address) as job:
        assert job.end(timeout_s=600) == 2, job.tail()
    assert "every loss and gradient must be finite" in job.tail()
    assert not list((job.folder / "checkpoints").glob(".failed"))


@pytest.mark.nightly
def test_the_same_error_twice_at_a_step_ends_the_run(root: Path, address: str, tmp_path: Path) -> None:
    import ray

    from pipeline.errors import InputError
    from pipeline.modeling.adapter_config import AdapterConfig
    from pipeline.modeling.base_model import BaseModelConfig
    from pipeline.orchestration.training import train
    from pipeline.stream import load_manifest
    from pipeline.training.config import TrainingConfig
    from pipeline.training.loop import TrainingJob

    # Labels without a label word: the shards were written for other tasks, which the command would have refused.
    tasks = tuple(
        task.model_copy(update={"label_words": task.label_words[:1]})
        for task in load_manifest(root / "shards")[0].tasks
    )
    job = TrainingJob(
        manifest_path=root / "shards",
        tasks=tasks,
        base=BaseModelConfig(base=str(root / "base"), dtype="float32"),
        adapter=AdapterConfig(r=4),
        training=TrainingConfig(num_workers=2, global_batch_size=16, max_steps=4, max_failures=50),
        seed=0,
    )
    ray.init(address=address, log_to_driver=False)
    try:
        with pytest.raises(InputError, match=r"failed twice in step \d+ with IndexError"):
            train(job, tmp_path, None)
    finally:
        ray.shutdown()
