"""The only door to Ray: a cluster, jobs on it, and the workers that train and score.

A cluster is the one named by an address, the one this process already runs a job of, or a local one that ends with
the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from tenacity import retry, retry_if_exception_message, stop_after_delay, wait_fixed

from pipeline.contracts import Sample
from pipeline.errors import InputError, did_you_mean
from pipeline.progress import say
from pipeline.tracking import Tracker
from pipeline.training.host import CHECKPOINTS, RunHost, listen_to_sigterm, stop_file
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


class Jobs:
    """The Ray jobs of one cluster.

    Args:
        address: of its dashboard, ``http://head:8265``.

    Raises:
        InputError: the cluster does not answer, or refuses for want of a token.
    """

    def __init__(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        self.address = address
        with _refusals(address):
            self._client = JobSubmissionClient(address)

    def submit(
        self,
        entrypoint: str,
        environment: Mapping[str, str],
        job_id: str | None = None,
        working_dir: Path | None = None,
    ) -> tuple[str, bool]:
        """Submit a command, or find the job of this id that runs or has succeeded.

        Args:
            entrypoint: shell command, run on the head node.
            environment: variables for the job, none of them secret.
            job_id: deterministic id of the work; a failed or stopped job of the id is tried again under a further one.
            working_dir: folder that is sent to the cluster.

        Returns:
            The job's id, and whether it was there already.
        """
        runtime_env: dict[str, Any] = {"env_vars": dict(environment)}
        if working_dir is not None:
            runtime_env["working_dir"] = str(working_dir)
        with _refusals(self.address):
            number, name = 1, job_id
            while name is not None and (state := self.state(name)) is not None:
                if state not in ("FAILED", "STOPPED"):
                    return name, True
                number += 1
                name = f"{job_id}-try{number}"
            try:
                return self._submit(entrypoint, name, runtime_env), False
            except RuntimeError:
                if name is None or self.state(name) is None:
                    raise
                return name, True  # another submit of the same work came first

    @retry(
        retry=retry_if_exception_message(match=".*No available agent.*"),  # of a cluster that is just starting
        wait=wait_fixed(2),
        stop=stop_after_delay(120),
        reraise=True,
    )
    def _submit(self, entrypoint: str, name: str | None, runtime_env: dict[str, Any]) -> str:
        return str(self._client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=runtime_env))

    def state(self, job_id: str) -> str | None:
        """Return a job's state (PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED), None where there is no such job."""
        try:
            return str(self._client.get_job_status(job_id).value)
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                return None
            raise

    def follow(self, job_id: str, show: Callable[[str], None]) -> int:
        """Show a job's log as it comes, until its end, and return its exit code."""
        with _refusals(self.address):
            asyncio.run(_follow(self._client, job_id, show))
            info = self._client.get_job_info(job_id)
        if info.driver_exit_code is None and info.status.value != "SUCCEEDED":
            show(f"job {job_id}: {info.status.value}, {info.message}")
            return 1
        return int(info.driver_exit_code or 0)

    def logs(self, job_id: str) -> str:
        """Return a job's log so far.

        Raises:
            InputError: there is no such job.
        """
        self._known(job_id)
        with _refusals(self.address):
            return str(self._client.get_job_logs(job_id))

    def status(self, job_id: str) -> dict[str, Any]:
        """Return what is known of a job.

        Raises:
            InputError: there is no such job.
        """
        self._known(job_id)
        with _refusals(self.address):
            return _job_row(self._client.get_job_info(job_id))

    def stop(self, job_id: str) -> bool:
        """Stop a job; whether it ran.

        Raises:
            InputError: there is no such job.
        """
        self._known(job_id)
        with _refusals(self.address):
            return bool(self._client.stop_job(job_id))

    def await_end(self, job_id: str) -> None:
        """Wait until a job that was told to stop has saved and ended, as long as the cluster lets it."""
        end = time.monotonic() + float(os.environ["RAY_JOB_STOP_WAIT_TIME_S"])
        while self.state(job_id) in ("PENDING", "RUNNING") and time.monotonic() < end:
            time.sleep(0.2)

    def all(self) -> list[dict[str, Any]]:
        """Return what is known of every submitted job, the oldest first."""
        with _refusals(self.address):
            jobs = [_job_row(job) for job in self._client.list_jobs() if job.submission_id]
        return sorted(jobs, key=lambda job: job["started"] or "")

    def _known(self, job_id: str) -> None:
        with _refusals(self.address):
            if self.state(job_id) is None:
                known = [job["job"] for job in self.all()]
                raise InputError(f"a job must be known to the cluster, got {job_id!r}{did_you_mean(job_id, known)}")


def _job_row(info: Any) -> dict[str, Any]:
    started, ended = (
        dt.datetime.fromtimestamp(moment / 1000, dt.UTC).isoformat(timespec="seconds") if moment else None
        for moment in (info.start_time, info.end_time)
    )
    return {
        "job": info.submission_id,
        "state": str(info.status.value),
        "exit_code": info.driver_exit_code,
        "started": started,
        "ended": ended,
        "message": info.message,
    }


@contextlib.contextmanager
def _refusals(address: str) -> Iterator[None]:
    """Turn what a cluster answers to a stranger, or does not, into a clear error."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if "401" in text or "nauthenticated" in text or "nauthorized" in text or "403" in text:
            raise InputError(
                f"the cluster at {address} asks for its token, got none or a wrong one; set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, in the environment"
            ) from error
        if isinstance(error, ConnectionError):
            raise InputError(
                f"ray.address must be a cluster that answers, got {address!r}: {text.splitlines()[0]}; "
                "start one with: ray start --head"
            ) from error
        raise


def run_job(config: RayConfig, entrypoint: str, environment: Mapping[str, str], show: Callable[[str], None]) -> int:
    """Run a command as a Ray job and return its exit code; a cancelled wait stops the job.

    Args:
        config: the cluster; a local one is started where none is named.
        entrypoint: shell command, run on the head node.
        environment: variables for the job, none of them secret.
        show: takes each line of the job's log.
    """
    remote = config.address or os.environ.get("RAY_ADDRESS", "")
    with contextlib.nullcontext(remote) if remote.startswith("http") else cluster(config) as address:
        jobs = Jobs(address)
        job_id, _ = jobs.submit(entrypoint, environment)
        try:
            return jobs.follow(job_id, show)
        except BaseException:
            jobs.stop(job_id)
            jobs.await_end(job_id)
            raise


async def _follow(client: Any, job_id: str, show: Callable[[str], None]) -> None:
    rest = ""
    async for piece in client.tail_job_logs(job_id):
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            show(line)
    if rest:
        show(rest)


def mapper(config: RayConfig) -> Callable[[Callable[[In], Out], Iterable[In]], Iterable[Out]]:
    """Return what applies a function to many items: Ray tasks where a cluster is there or named, else ``map``.

    Results come in the order of the items; an error in a task is raised as it was raised there, and ends the others.
    Functions must bear being run again: a task of a lost worker is.
    """
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    if not ray.is_initialized() and not inside_job() and (not address or address.startswith("http")):
        return map

    def over_the_cluster(function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
        with cluster(config):
            yield from _in_order(ray.remote(num_cpus=1)(function), items, 2 * int(ray.cluster_resources()["CPU"]))

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
        InputError: the cluster has fewer CPUs or GPUs than workers.
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
    stop = stop_file(run_folder)
    with _sigterm_asks(stop):
        trainer.fit()
    if stop.exists():
        stop.unlink()
        say(f"stopped by SIGTERM, saved in {stop.parent}; the same command goes on from there")
        raise SystemExit(128 + signal.SIGTERM)
    found = Checkpoints(stop.parent, job.adapter_sha256).newest()
    if found is None:
        raise RuntimeError("a finished training run must leave a checkpoint, got none; see the worker's log above")
    return found


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
    with RunHost(run_folder, world, job.training.hang_timeout_s, settings["tracker"], _node_drains) as host:
        from pipeline.training.loop import Trainer

        finished = Trainer(job, world, host, run_folder / CHECKPOINTS).run()
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
