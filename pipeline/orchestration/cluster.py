"""A Ray cluster: the one named by an address, the one this process already runs a job of, or a local one that ends with
the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import ray

from pipeline.errors import InputError, masked
from pipeline.orchestration.config import RayConfig
from pipeline.orchestration.environment import address_of, inside_job, of_workers
from pipeline.progress import say

_ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Variable that, being 0, lets Ray's processes keep the loopback as the address of their machine, on any system."""


@contextlib.contextmanager
def cluster(config: RayConfig, log_to_driver: bool = True) -> Iterator[str]:
    """Join or start the cluster and yield the address of its dashboard.

    Args:
        config: which cluster.
        log_to_driver: whether this process writes down what its workers write.

    Raises:
        InputError: the named cluster does not answer.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)  # its warnings speak of how Ray may be set up, to nobody here
    address = (os.environ.get("RAY_ADDRESS") or "auto") if inside_job() else address_of(config.address)
    if ray.is_initialized():
        yield _dashboard()
        return
    ended = contextlib.ExitStack()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    # Private: all who see the cluster see the command lines of its drivers. A parameter of ray.init for what it calls
    # this one would replace it.
    ray._private.utils.get_entrypoint_name = _command
    try:
        if address and address != "local" and not address.startswith("http"):
            runtime_env = {"env_vars": names} if (names := of_workers()) else None
            ray.init(address=address, runtime_env=runtime_env, log_to_driver=log_to_driver, logging_level=logging.ERROR)
        else:
            say("Starting a local Ray cluster …")
            folder = ended.enter_context(_own_folder())
            with _on_the_loopback():
                ray.init(
                    address="local",
                    include_dashboard=True,
                    object_store_memory=config.object_store_mb * 2**20,
                    log_to_driver=log_to_driver,
                    logging_level=logging.ERROR,
                )
            # Private: ray.init writes this file into the common folder only. An option of ray.init for the folder in
            # which jobs look for their cluster would replace it.
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


def capacity(config: RayConfig) -> dict[str, float]:
    """Join or start the cluster, and return what it has: ``CPU``, ``GPU``, ``memory`` in bytes.

    Raises:
        InputError: the named cluster does not answer.
    """
    with cluster(config, log_to_driver=False):
        return dict(ray.cluster_resources())


def _command() -> str:
    """Return the command line of this process without secrets."""
    return masked(shlex.join(sys.orig_argv))


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
def _on_the_loopback() -> Iterator[None]:
    """Let what is started listen on the loopback alone, and the dashboard's agent take any free port: its fixed one
    lets the second cluster on a machine take no jobs."""
    # Private: ray start has --dashboard-agent-listen-port, ray.init has nothing; and ray.init replaces a loopback in
    # its _node_ip_address by the machine's address. Options of ray.init for both would replace it.
    parameters: Any = ray._private.parameter.RayParams
    original = parameters.__init__

    def told(self: Any, **known: Any) -> None:
        original(self, **{**known, "node_ip_address": "127.0.0.1", "dashboard_agent_listen_port": None})

    parameters.__init__ = told
    before = os.environ.get(_ONE_MACHINE)
    os.environ[_ONE_MACHINE] = "0"
    try:
        yield
    finally:
        parameters.__init__ = original
        os.environ.pop(_ONE_MACHINE)
        if before is not None:
            os.environ[_ONE_MACHINE] = before


def _dashboard() -> str:
    # Private: ray.init's answer holds the address too, but not in a process that another part has connected already.
    # A public ray.get_dashboard_url would replace it.
    url = ray._private.worker.get_dashboard_url()
    return f"http://{url}" if url else ""
