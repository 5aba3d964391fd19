"""Training on Ray workers: started, stopped with everything saved, gone on with after a loss."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchConfig, TorchTrainer

# Private: a backend is how code gets into the main thread of a worker, where alone a signal can be listened to. A
# public hook that runs there before the training function, or a public base class of backends, would replace it.
from ray.train.torch.config import _TorchBackend

# Private: see _node_drains. A public question that is no collective call would replace it.
from ray.train.v2._internal.execution.context import get_train_context

from pipeline.contracts import write_atomic
from pipeline.errors import InputError
from pipeline.log_lines import name_process
from pipeline.mirror import Mirror, SharedFolder, here
from pipeline.orchestration.environment import is_on_lasting_cluster
from pipeline.orchestration.metrics import TrainingMetrics
from pipeline.orchestration.placement import scaling
from pipeline.progress import say
from pipeline.storage import filesystem
from pipeline.tracking import Tracker
from pipeline.training.callbacks import (
    CHECKPOINTS,
    HISTORY,
    LOADING_S,
    RunCallbacks,
    failed_file,
    listen_to_sigterm,
    stop_file,
)
from pipeline.training.failures import failure_file, forget, repeated
from pipeline.training.run_store import RunStore, Watch, fetch_ledger, forget_ranks
from pipeline.world import World

if TYPE_CHECKING:
    from pipeline.training.loop import TrainingJob


def train(
    job: TrainingJob,
    run_folder: Path,
    tracker: Tracker | None,
    mirror: Mirror | None = None,
    warm_start: Path | SharedFolder | None = None,
) -> Path:
    """Train on Ray workers and return the folder of the last checkpoint.

    A run of the same folder that was cut off goes on from its newest whole checkpoint; a lost worker is replaced.
    SIGTERM, to this process or to a worker's, makes all ranks save after the step they are in.

    Args:
        job: what is trained, on what.
        run_folder: shared by all nodes; holds ``checkpoints/``, ``history.jsonl`` and the ledger.
        tracker: MLflow run that rank 0 writes to.
        mirror: of the run's folder where it lies on object storage; no disk need be shared then.
        warm_start: where ranks find the folder of ``job.training.warm_start``; None: under that path.

    Raises:
        InputError: the cluster has too little for the ranks, or a rank met what no restart can fix, such as a
            loss that is not finite or the same error twice at the same step.
        SystemExit: SIGTERM came; everything is saved.
    """
    from pipeline.training.checkpoint import Checkpoints

    config = job.training
    placement = scaling(config, ray.cluster_resources())
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.hang_timeout_s)
    if not is_on_lasting_cluster(""):  # a cluster that ends with this process drains no node
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    trainer = TorchTrainer(
        _train_rank,
        train_loop_config={
            "job": ray.cloudpickle.dumps(job),
            "run_folder": run_folder,
            "tracker": tracker,
            "url": None if mirror is None else mirror.url,
            "warm_start": warm_start,
        },
        torch_config=_WorkerConfig(
            backend="nccl" if placement.use_gpu else "gloo", timeout_s=math.ceil(max(config.hang_timeout_s, LOADING_S))
        ),
        scaling_config=placement,
        run_config=RunConfig(
            name=".ray",
            **_storage(run_folder, mirror),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    stop, failed = stop_file(run_folder), failed_file(run_folder)
    with _sigterm_asks(stop), _told(mirror, stop):
        failed.unlink(missing_ok=True)
        forget(stop.parent)
        try:
            trainer.fit()
        except Exception as error:
            _raise_failure(failed, mirror, error)
            raise
        _raise_failure(failed, mirror)
    if mirror is not None:
        for name in (CHECKPOINTS, HISTORY):
            mirror.pull(name)
        fetch_ledger(mirror)
        forget_ranks(mirror.url)
    if stop.exists():
        stop.unlink()
        say(f"stopped by SIGTERM, saved in {stop.parent}; the same command goes on from there")
        raise SystemExit(128 + signal.SIGTERM)
    found = Checkpoints(stop.parent, job.adapter_sha256).newest()
    if found is None:
        raise RuntimeError("a finished training run must leave a checkpoint, got none; see the worker's log above")
    return found


def _storage(run_folder: Path, mirror: Mirror | None) -> dict[str, Any]:
    """Return where Ray Train keeps what it knows of the workers."""
    if mirror is None:
        return {"storage_path": str(run_folder.resolve())}
    files, path = filesystem(mirror.url)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(files))}


@contextlib.contextmanager
def _told(mirror: Mirror | None, stop: Path) -> Iterator[None]:
    """Within it ranks that do not see this folder hear what it says, from nothing on; behind it nothing is left."""
    if mirror is None:
        yield
        return
    name = stop.relative_to(mirror.folder).as_posix()
    clear = [name for name in mirror.names(CHECKPOINTS) if Path(name).parent.name == CHECKPOINTS and "/." in name]
    for old in clear:
        mirror.remove(old)
    with Watch(lambda: mirror.put(name) if stop.exists() else None):
        yield
    mirror.remove(name)


def _raise_failure(failed: Path, mirror: Mirror | None, cause: Exception | None = None) -> None:
    if mirror is not None:
        mirror.fetch(failed.relative_to(mirror.folder).as_posix())
    if failed.is_file():
        message = failed.read_text()
        failed.unlink()
        raise InputError(message) from cause


@contextlib.contextmanager
def _sigterm_asks(stop: Path) -> Iterator[None]:
    """Within it the first SIGTERM makes the file that asks the ranks to stop; a second one acts as before."""
    stop.parent.mkdir(parents=True, exist_ok=True)
    stop.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def ask(*_: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        stop.touch()

    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _WorkerBackend(_TorchBackend):
    """Torch's set-up of the workers; and SIGTERM is listened to, which only the main thread can arrange."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(listen_to_sigterm)


class _WorkerConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[_WorkerBackend]:
        return _WorkerBackend


def _train_rank(settings: dict[str, Any]) -> None:
    # Bytes until here: Ray Train's controller, which reads the settings too, need not import what trains.
    context, job, run_folder = ray.train.get_context(), pickle.loads(settings["job"]), settings["run_folder"]
    world = World(context.get_world_rank(), context.get_world_size())
    name_process(run=settings["run_folder"].name, rank=world.rank)
    store = None if settings["url"] is None else RunStore(settings["url"], world)
    run_folder = run_folder if store is None else store.folder
    failed, noted = failed_file(run_folder), failure_file(run_folder / CHECKPOINTS, world.rank)
    if store is not None:
        store.hears(failed)
    if settings["warm_start"] is not None:
        training = job.training.model_copy(update={"warm_start": here(settings["warm_start"])})
        job = dataclasses.replace(job, training=training)
    if failed.is_file():
        return  # Ray starts lost workers again whatever they were lost to: the driver raises what is written there
    around = (job.training.hang_timeout_s, settings["tracker"], _node_drains, store)
    with _MeasuredCallbacks(settings["run_folder"].name, run_folder, world, *around) as callbacks:
        from pipeline.training.loop import Trainer

        try:
            finished = Trainer(job, world, callbacks, run_folder / CHECKPOINTS, store=store).run()
        except Exception as error:
            if store is not None:
                store.hears(noted)
            reason = (
                str(error)
                if isinstance(error, InputError)
                else repeated(noted.parent, world.rank, callbacks.step, error)
            )
            if reason:
                write_atomic(failed, reason)
            for path in (failed, noted):
                if store is not None and path.is_file():
                    store.tell(path)
            raise
    if store is not None and not finished:
        store.hears(stop_file(run_folder))
    is_asked = stop_file(run_folder).exists()
    if store is not None:
        store.close()
    if not finished and not is_asked:
        raise PreemptedError("a rank was told to stop, all have saved; training goes on with other workers")


class _MeasuredCallbacks(RunCallbacks):
    """A rank's surroundings, in which rank 0 exports its history as metrics, too."""

    def __init__(self, run: str, *around: Any) -> None:
        super().__init__(*around)
        self.run = run
        self.metrics: TrainingMetrics | None = None

    def started(self, step: int, num_steps: int) -> None:
        super().started(step, num_steps)
        if self.world.rank == 0:
            self.metrics = TrainingMetrics(self.run, self.run_folder / CHECKPOINTS)

    def log(self, row: dict[str, Any]) -> None:
        super().log(row)
        if self.metrics is not None:
            self.metrics.log(row)


class PreemptedError(RuntimeError):
    """Workers stopped because one of them had to; the run goes on from the checkpoint that they left."""


def _node_drains() -> bool:
    """Whether Ray drains a worker's node, as it does before a machine is taken away."""
    # The public ray.train.get_preemption_info() is a collective call of some ten milliseconds.
    return get_train_context().preemption_context.preemption_info is not None
