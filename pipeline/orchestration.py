"""The only door to Ray of the pipeline: a cluster, and the workers that prepare, train and score on it.

A cluster is the one named by an address, the one this process already runs a job of, or a local one that ends with
the process.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import pickle
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

# Must stand before Ray is imported: the controller asks workers this often whether they live and what they report.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# A job that is stopped first saves: the cluster started here waits so long before it kills.
os.environ.setdefault("RAY_JOB_STOP_WAIT_TIME_S", "120")

import ray
import ray.train
from pydantic import BaseModel, ConfigDict, Field
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.context import get_train_context
from ray.util import ActorPool

from pipeline.contracts import Sample, write_atomic
from pipeline.errors import InputError
from pipeline.progress import say
from pipeline.tracking import Tracker
from pipeline.training.host import CHECKPOINTS, RunHost, failed_file, listen_to_sigterm, stop_file
from pipeline.world import World

_INSIDE_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_END_S = 30.0
In = TypeVar("In")
Out = TypeVar("Out")


class RayConfig(BaseModel):
    """Which cluster runs the job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str = ""
    """Cluster to join (``http://head:8265``, ``auto`` or ``head:6379``); empty: RAY_ADDRESS, else a local cluster, for
    which ``prepare`` alone must be told ``local``."""
    object_store_mb: int = Field(default=200, ge=80)
    """Object store of a local cluster, in MiB; samples and scores are small."""


def inside_job() -> bool:
    """Whether this process is the driver of a Ray job."""
    return _INSIDE_JOB in os.environ


@contextlib.contextmanager
def cluster(config: RayConfig) -> Iterator[str]:
    """Join or start the cluster and yield the address of its dashboard.

    Raises:
        InputError: the named cluster does not answer.
    """
    logging.getLogger("ray").setLevel(logging.WARNING)
    named = os.environ.get("RAY_ADDRESS", "")
    address = (named or "auto") if inside_job() else config.address or named
    if ray.is_initialized():
        yield _dashboard()
        return
    ended = contextlib.ExitStack()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address and address != "local" and not address.startswith("http"):
            ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        else:
            say("Starting a local Ray cluster …")
            folder = ended.enter_context(_own_folder())
            with _free_agent_port():
                ray.init(
                    address="local",
                    include_dashboard=True,
                    object_store_memory=config.object_store_mb * 2**20,
                    log_to_driver=True,
                    logging_level=logging.WARNING,
                )
            ray._private.utils.write_ray_address(ray.get_runtime_context().gcs_address, folder)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"ray.address must be a cluster that answers, got {address!r}: {error}; start one with: ray start --head"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray's handler calls the one before it, but aborts the process three seconds later, saved or not.
        signal.signal(signal.SIGTERM, on_sigterm)
    with ended:
        ended.callback(ray.shutdown)
        yield _dashboard()


@contextlib.contextmanager
def _own_folder() -> Iterator[str]:
    """Give a local cluster a folder of its own: Ray's jobs and its housekeeping look there for the address of their
    cluster, and in the common folder they would find that of any other cluster on this machine."""
    before = os.environ.get("RAY_TMPDIR")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        try:
            yield f"{folder}/ray"
        finally:
            os.environ.pop("RAY_TMPDIR")
            if before is not None:
                os.environ["RAY_TMPDIR"] = before


@contextlib.contextmanager
def _free_agent_port() -> Iterator[None]:
    """Let the dashboard's agent take any free port: ``ray.init`` has no option for it, and its fixed one lets the
    second cluster on a machine take no jobs."""
    parameters: Any = ray._private.parameter.RayParams
    original = parameters.__init__
    parameters.__init__ = functools.partialmethod(original, dashboard_agent_listen_port=None)
    try:
        yield
    finally:
        parameters.__init__ = original


def _dashboard() -> str:
    url = ray._private.worker.get_dashboard_url()
    return f"http://{url}" if url else ""


def mapper(config: RayConfig, alone_s: float = 3.0) -> Callable[[Callable[[In], Out], Iterable[In]], Iterable[Out]]:
    """Return what applies a function to many items: Ray tasks where a cluster is there or named, else ``map``.

    Results come in the order of the items; an error in a task is raised as it was raised there, and ends the others.
    Functions must bear being run again: a task of a lost worker is.

    Args:
        config: the cluster.
        alone_s: so many seconds, and the first item at least, this process works alone before it asks the cluster:
            workers would not have started sooner.
    """
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    if not ray.is_initialized() and not inside_job() and (not address or address.startswith("http")):
        return map

    def over_the_cluster(function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
        with cluster(config):
            rest, end = iter(items), time.monotonic() + alone_s
            for item in rest:
                yield function(item)
                if time.monotonic() > end:
                    break
            yield from _in_order(ray.remote(num_cpus=1)(function), rest, 2 * int(ray.cluster_resources()["CPU"]))

    return over_the_cluster


def _in_order(task: Any, items: Iterable[Any], most: int) -> Iterator[Any]:
    waiting: deque[Any] = deque()
    try:
        for item in items:
            if len(waiting) >= most:
                yield _result(waiting.popleft())
            waiting.append(task.remote(item))
        while waiting:
            yield _result(waiting.popleft())
    finally:
        for reference in waiting:  # an error: whoever tries again must not meet these at work
            ray.cancel(reference, force=True)
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting), timeout=_END_S)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None


def train(job: Any, run_folder: Path, tracker: Tracker | None) -> Path:
    """Train on Ray workers and return the folder of the last checkpoint.

    A run of the same folder that was cut off goes on from its newest whole checkpoint; a lost worker is replaced.
    SIGTERM, to this process or to a worker's, makes all ranks save after the step they are in.

    Args:
        job: a :class:`pipeline.training.loop.TrainingJob`.
        run_folder: shared by all nodes; holds ``checkpoints/``, ``history.jsonl`` and the ledger.
        tracker: MLflow run that rank 0 writes to.

    Raises:
        InputError: the cluster has fewer CPUs or GPUs than workers, or a rank met what no restart can mend, such as a
            loss that is not finite.
        SystemExit: SIGTERM came; everything is saved.
    """
    from pipeline.training.checkpoint import Checkpoints

    config = job.training
    gpus = int(ray.cluster_resources().get("GPU", 0))
    least = config.min_workers or config.num_workers
    have = gpus or int(ray.cluster_resources().get("CPU", 0))
    if have < least:
        raise InputError(
            f"training.{'min' if config.min_workers else 'num'}_workers must be at most the cluster's "
            f"{'GPUs' if gpus else 'CPUs'}, {have}, got {least}; lower it or add a node"
        )
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.hang_timeout_s)
    trainer = TorchTrainer(
        _train_rank,
        train_loop_config={"job": ray.cloudpickle.dumps(job), "run_folder": run_folder, "tracker": tracker},
        torch_config=_WorkerConfig(backend="nccl" if gpus else "gloo", timeout_s=math.ceil(config.hang_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=(least, config.num_workers) if config.min_workers else config.num_workers,  # type: ignore[arg-type]
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": 1},
        ),
        run_config=RunConfig(
            name=".ray",
            storage_path=str(run_folder.resolve()),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    stop, failed = stop_file(run_folder), failed_file(run_folder)
    with _sigterm_asks(stop):
        failed.unlink(missing_ok=True)
        try:
            trainer.fit()
        except Exception as error:
            _raise_failure(failed, error)
            raise
        _raise_failure(failed)
    if stop.exists():
        stop.unlink()
        say(f"stopped by SIGTERM, saved in {stop.parent}; the same command goes on from there")
        raise SystemExit(128 + signal.SIGTERM)
    found = Checkpoints(stop.parent, job.adapter_sha256).newest()
    if found is None:
        raise RuntimeError("a finished training run must leave a checkpoint, got none; see the worker's log above")
    return found


def _raise_failure(failed: Path, cause: Exception | None = None) -> None:
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
    if failed_file(run_folder).is_file():
        return  # Ray starts lost workers again whatever they were lost to: the driver raises what is written there
    with RunHost(run_folder, world, job.training.hang_timeout_s, settings["tracker"], _node_drains) as host:
        from pipeline.training.loop import Trainer

        try:
            finished = Trainer(job, world, host, run_folder / CHECKPOINTS).run()
        except InputError as error:
            write_atomic(failed_file(run_folder), str(error))
            raise
    if not finished and not stop_file(run_folder).exists():
        raise PreemptedError("a rank was told to stop, all have saved; training goes on with other workers")


class PreemptedError(RuntimeError):
    """Workers stopped because one of them had to; the run goes on from the checkpoint that they left."""


def _node_drains() -> bool:
    """Whether Ray drains a worker's node, as it does before a machine is taken away."""
    # The public ray.train.get_preemption_info() is a collective call of some ten milliseconds.
    return get_train_context().preemption_context.preemption_info is not None


class ScoringPool:
    """Workers that score samples side by side; asked like one scorer.

    Args:
        load: returns, on a worker, scorers by name (see :class:`pipeline.modeling.scoring.Scorer`).
        num_workers: processes of one CPU each, and one GPU each where the cluster has as many.
    """

    def __init__(self, load: Callable[[], dict[str, Any]], num_workers: int) -> None:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= num_workers else 0
        worker = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=2, max_task_retries=2)(_ScoringWorker)
        self.actors: list[Any] = [worker.remote(load) for _ in range(num_workers)]
        self.model = "trained"
        """Name of the scorer that is asked."""
        self.progress: Callable[[int], None] | None = None
        self.wanted: frozenset[tuple[str, str]] = frozenset()
        """Task and key of the samples whose hidden states are kept."""
        self.states: dict[tuple[str, str], Any] = {}
        """The hidden states (H,) of the wanted samples that were scored."""

    def probabilities(self, samples: Sequence[Sample]) -> list[Any]:
        """Return each sample's class probabilities, in the order given."""
        # In like company there is little padding; longest first, so that no worker is left with the longest at the end.
        order = sorted(range(len(samples)), key=lambda i: -sum(map(len, samples[i].fields.values())))
        chunks = [order[first : first + _CHUNK] for first in range(0, len(order), _CHUNK)]
        tasks = [(self.model, chunk, [samples[i] for i in chunk], self.wanted) for chunk in chunks]
        results: list[Any] = [None] * len(samples)
        pool = ActorPool(self.actors)
        for chunk, probabilities, states in pool.map_unordered(lambda actor, task: actor.score.remote(*task), tasks):
            self.states.update(states)
            for i, row in zip(chunk, probabilities, strict=True):
                results[i] = row
            if self.progress is not None:
                self.progress(len(chunk))
        return results

    def latency_ms(self, samples: Sequence[Sample]) -> float:
        """Return the median time in milliseconds in which one worker answers one row alone, the others idle."""
        return float(ray.get(self.actors[0].latency_ms.remote(self.model, list(samples))))


@contextlib.contextmanager
def scoring_pool(load: Callable[[], dict[str, Any]], num_workers: int) -> Iterator[ScoringPool]:
    """Yield a :class:`ScoringPool` whose workers end with the block."""
    pool = ScoringPool(load, num_workers)
    try:
        yield pool
    finally:
        for actor in pool.actors:
            ray.kill(actor)


_CHUNK = 64
"""Samples a call: enough to batch by length, few enough to share out evenly and to show progress."""


class _ScoringWorker:
    def __init__(self, load: Callable[[], dict[str, Any]]) -> None:
        self.scorers = load()

    def score(
        self, model: str, chunk: list[int], samples: Sequence[Sample], wanted: frozenset[tuple[str, str]]
    ) -> tuple[list[int], list[Any], dict[tuple[str, str], Any]]:
        answers = self.scorers[model].answers(samples)
        states = {(s.task, s.key): state for s, (_, state) in zip(samples, answers, strict=True)}
        kept = {name: state for name, state in states.items() if name in wanted}
        return chunk, [probabilities for probabilities, _ in answers], kept

    def latency_ms(self, model: str, samples: Sequence[Sample]) -> float:
        from pipeline.evaluation.predict import latency_ms

        return latency_ms(self.scorers[model], samples)
