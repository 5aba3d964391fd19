"""A verb as a Ray job: submitted, followed line by line, its result and exit code brought back.

``run_as_job`` is for the one who waits on a cluster of the same machine or file system. ``submit`` sends code and
configuration along, under an id that follows from both, so that the same work is never done twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit

from jobs import SECRETS
from jobs.cluster.log_view import LogView, plain
from jobs.cluster.ray_jobs import Jobs, run_job
from jobs.config import RunConfig
from jobs.run import Run
from pipeline.errors import InputError
from pipeline.log_lines import LOG_FORMAT, is_json
from pipeline.orchestration.environment import OWN_CLUSTER, address_of
from pipeline.progress import TOKEN, console, say
from pipeline.tracking import TrackingConfig

_FROM_CONFIGURATION = ("prepare", "plan", "train", "evaluate", "export", "demo", "retrain", "tune")


def run_as_job(verb: str, config: RunConfig, extra: Sequence[str] = ()) -> tuple[int, Any]:
    """Run a verb of this configuration as a Ray job; return its exit code and its result, if it handed one over."""
    from jobs.main_job import run_stage
    from jobs.stages.check import check

    run = Run(config)
    if verb != "evaluate":  # that one looks at the folder of any configuration
        run.folder.check_configuration(config.digest())
    if config.retraining is not None or config.ray.address or os.environ.get("RAY_ADDRESS"):
        check(config)
        path = config.write()
    else:  # the cluster will be this machine: what is wrong with the input shows before it is started
        run_stage(run, "prepare")
        path = config.write()
    command = [sys.executable, "-m", "jobs.cli", verb, "--config", str(path), *extra]
    environment = _environment(config.tracking, ())
    if address_of(config.ray.address) in ("", "local"):
        environment[OWN_CLUSTER] = "1"
    with LogView(environment[TOKEN], run.folder.job_log, str(run.folder.job_log)) as view:
        code = run_job(config.ray, shlex.join(command), environment, view.show)
        view.ended(code)
    return code, view.result


def _environment(tracking: TrackingConfig, secrets: Sequence[str]) -> dict[str, str]:
    """Return the job's variables; of secrets, among them a tracking URI with a password, the name alone.

    A cluster that this process starts has such a URI from this process's environment, which takes it from here.
    """
    found = {TOKEN: token_hex(8), "PYTHONUNBUFFERED": "1"}
    if is_json():
        found[LOG_FORMAT] = "json"
    if console.is_terminal:  # tables as wide as they are shown
        found["COLUMNS"] = str(console.width)
    if tracking.is_secret:
        os.environ["MLFLOW_TRACKING_URI"] = tracking.uri
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri and not TrackingConfig(uri=uri).is_secret:
        found["MLFLOW_TRACKING_URI"] = uri
    elif uri:
        secrets = (*secrets, "MLFLOW_TRACKING_URI")
    return {**found, SECRETS: ",".join(sorted(set(secrets)))}


def submit(
    verb: str, config: RunConfig, extra: Sequence[str], address: str, secrets: Sequence[str], wait: bool
) -> tuple[int, dict[str, Any]]:
    """Submit a verb to a cluster, or attach to the job that does the same work already.

    Args:
        verb: what to run.
        config: of the run; paths in it must mean the same on the cluster.
        extra: further options of the verb.
        address: of the cluster's dashboard.
        secrets: names of variables that the cluster's own environment holds; only the names travel, and the job
            refuses to start where one is missing.
        wait: follow the log until the end.

    Returns:
        The job's exit code, 0 without waiting, and its id, whether it was there already, and its result.

    Raises:
        InputError: the cluster does not answer or refuses, ``address`` is no http address, or a secret's name is none.
    """
    for place, name in enumerate(secrets, 1):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(
                f"--secret must be the name of a variable, such as HF_TOKEN, got something else as number {place} (not "
                "shown, it may hold the secret); give the name alone, the cluster's environment holds the value"
            )
    if not address.startswith("http"):
        raise InputError(f"--address must be a dashboard's, http://head:8265, got {address!r}; name the dashboard")
    jobs = Jobs(address)
    with tempfile.TemporaryDirectory() as folder:
        digest = _stage(config, Path(folder))
        parts = json.dumps([verb, list(extra), sorted(secrets), digest])
        job_id = f"mtl-lora-{verb}-{config.name}-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"
        python = sys.executable if _is_this_machine(address) else "python"
        command = shlex.join([python, "-m", "jobs.cli", verb, "--config", "config.yaml", *extra])
        job_id, attached = jobs.submit(
            command,
            _environment(config.tracking, secrets),
            job_id,
            Path(folder),
            is_done_once=_is_done_once(verb, config),
        )
    say(f"job {job_id} {'is there already; attaching' if attached else 'submitted'}")
    found = {"job": job_id, "attached": attached}
    if not wait:
        return 0, found
    whole_log = f"mtl-lora logs {job_id} --address {address}"
    with LogView(jobs.variable(job_id, TOKEN), None, whole_log) as view:  # another may have submitted it
        code = jobs.follow(job_id, view.show)
        view.ended(code)
    return code, found | {"exit_code": code, "result": view.result}


def show_log(job_id: str, address: str, follow: bool) -> int:
    """Print a job's log on standard output, its messages in words; return the job's exit code, 0 without following.

    Args:
        job_id: of the job.
        address: of the cluster's dashboard.
        follow: print further lines as they come, until the job ends.

    Raises:
        InputError: the cluster does not answer or refuses, or there is no such job.
    """
    jobs = Jobs(address)
    token = jobs.variable(job_id, TOKEN)

    def show(line: str) -> None:
        print(plain(line, token), flush=True)  # noqa: T201

    if follow:
        return jobs.follow(job_id, show)
    for line in jobs.logs(job_id).splitlines():
        show(line)
    return 0


def _stage(config: RunConfig, folder: Path) -> str:
    """Copy this code and the configuration into a folder and return the digest of both."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in ("jobs", "mtl_lora", "pipeline"):
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (folder / "config.yaml").write_text(config.as_yaml())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _is_done_once(verb: str, config: RunConfig) -> bool:
    """Whether the verb's outcome follows from the configuration alone, so that doing it again would change nothing."""
    return verb in _FROM_CONFIGURATION and (verb != "retrain" or config.retraining is None)


def _is_this_machine(address: str) -> bool:
    return urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
