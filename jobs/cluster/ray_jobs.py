"""Commands as Ray jobs: submitted, followed, asked about and stopped through a cluster's dashboard."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tenacity import retry, retry_if_exception_message, stop_after_delay, wait_fixed

from pipeline.errors import InputError, did_you_mean
from pipeline.orchestration.cluster import cluster
from pipeline.orchestration.config import RayConfig
from pipeline.orchestration.environment import address_of


class Jobs:
    """The Ray jobs of one cluster.

    Args:
        address: of its dashboard, ``http://head:8265``.

    Raises:
        InputError: the cluster does not answer, or refuses for want of a token.
    """

    def __init__(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
            # Each sets its own level to INFO, whatever that of Ray is.
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address
        with _refusals(address):
            self._client = JobSubmissionClient(address)

    def submit(
        self,
        entrypoint: str,
        environment: Mapping[str, str],
        job_id: str | None = None,
        working_dir: Path | None = None,
        is_done_once: bool = True,
    ) -> tuple[str, bool]:
        """Submit a command, or find the job of this id that does it already.

        Args:
            entrypoint: shell command, run on the head node.
            environment: variables for the job, none of them secret.
            job_id: deterministic id of the work; where a job of the id has ended and the work is to be done again, a
                further one is made of it.
            working_dir: folder that is sent to the cluster.
            is_done_once: whether a job that has succeeded is found too; else only one that waits or runs.

        Returns:
            The job's id, and whether it was there already.
        """
        runtime_env: dict[str, Any] = {"env_vars": dict(environment)}
        if working_dir is not None:
            runtime_env["working_dir"] = str(working_dir)
        with _refusals(self.address):
            number, name = 1, job_id
            while name is not None and (state := self.state(name)) is not None:
                if state in ("PENDING", "RUNNING") or (state == "SUCCEEDED" and is_done_once):
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

    def variable(self, job_id: str, name: str) -> str:
        """Return a variable with which a job was submitted, empty where it was submitted without.

        Raises:
            InputError: there is no such job.
        """
        self._known(job_id)
        with _refusals(self.address):
            runtime_env = self._client.get_job_info(job_id).runtime_env or {}
        return str(runtime_env.get("env_vars", {}).get(name, ""))

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
    remote = address_of(config.address)
    # The job's log has its workers' lines.
    is_remote = remote.startswith("http")
    with contextlib.nullcontext(remote) if is_remote else cluster(config, log_to_driver=False) as address:
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
