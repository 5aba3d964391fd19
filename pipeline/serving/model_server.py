"""The models behind the server: Ray Serve replicas that answer batches and follow an alias of the registry.

Each replica asks where the alias points. When it moves, forwards or by a rollback, the replicas change over one after
another: each loads the new version beside the old one, which answers until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray import serve

from pipeline.errors import InputError, masked
from pipeline.promotion.versions import RegistryUnavailable
from pipeline.serving.batching import Answer, Row, Version
from pipeline.serving.served_model import ServedModel, resolve
from pipeline.serving.server_config import ServerConfig

_TURN_S = 300.0
"""A replica that has not changed over within this time has lost its turn."""
_BOOKED, _MOST_THREADS = 0.9, 8
"""Share of the cores that is booked with Ray; threads a model, beyond which it gains little."""
_log = logging.getLogger(__name__)


class NoVersion(Exception):
    """The alias names no version at the moment."""


@ray.remote(num_cpus=0)
class _Turns:
    """Lets one replica at a time change over."""

    def __init__(self) -> None:
        self._holder, self._since = "", 0.0

    def take(self, who: str) -> bool:
        """Whether the turn is this replica's now."""
        if self._holder in ("", who) or time.monotonic() - self._since > _TURN_S:
            self._holder, self._since = who, time.monotonic()
        return self._holder == who

    def give(self, who: str) -> None:
        """End the turn."""
        if self._holder == who:
            self._holder = ""


@contextlib.contextmanager
def _turn(who: str, wait_s: float) -> Iterator[None]:
    actor: Any = _Turns
    turns = actor.options(name="mtl-lora-turns", get_if_exists=True, lifetime="detached").remote()
    while not ray.get(turns.take.remote(who)):
        time.sleep(min(wait_s, 1.0))
    try:
        yield
    finally:
        ray.get(turns.give.remote(who))


class ModelServer:
    """One replica.

    Args:
        config: of the server.
        model: that is answered with: a reference as :func:`pipeline.serving.served_model.resolve` takes it.
        is_needed: whether there must be such a version; else the replica waits for one.
        niceness: added to the process's, so that others go first.
        threads: that compute, where there is no accelerator.
    """

    def __init__(
        self, config: ServerConfig, model: str, is_needed: bool = True, niceness: int = 0, threads: int = 1
    ) -> None:
        import torch

        os.nice(niceness)
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
        self._config, self._reference = config, model
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._served: ServedModel | None = None
        self._version: Version | None = None
        self._name = serve.get_replica_context().replica_tag
        if is_needed:
            self._change(resolve(model, config.registry))
        if "@" in model:  # a thread of its own, so that requests are answered while a version is loaded
            threading.Thread(target=self._follow, name="follow", daemon=True).start()

    async def answer(self, requests: Sequence[Sequence[Row]]) -> tuple[str, list[list[Answer] | InputError]]:
        """Answer requests together by one version; return its name, and each one's answers or its error.

        Raises:
            NoVersion: there is none.
        """
        version = self._present()
        loop = asyncio.get_running_loop()
        return version.words, await loop.run_in_executor(self._thread, version.answer_each, requests)

    async def describe(self) -> dict[str, Any]:
        """Return the name of the version that answers, and of each task its kind, fields and label words.

        Raises:
            NoVersion: there is none.
        """
        version = self._present()
        tasks = {
            spec.name: {
                "kind": spec.kind,
                "fields": [*spec.text_fields, *([spec.choices_field] if spec.kind == "choice" else [])],
                "label_words": list(spec.label_words),
            }
            for spec in version.predictor.spec.tasks
        }
        return {"model": version.words, "tasks": tasks}

    def _present(self) -> Version:
        if self._version is None:
            raise NoVersion(self._reference)
        return self._version

    def _change(self, found: ServedModel) -> None:
        predictor = found.load(self._config.batch_tokens)
        self._served, self._version = found, Version(found.words, predictor)

    def _follow(self) -> None:
        while True:
            time.sleep(self._config.poll_s)
            try:
                found = resolve(self._reference, self._config.registry)
                if found == self._served:
                    continue
                with _turn(self._name, self._config.poll_s):
                    self._change(found)
                _log.warning("%s answers now", found.words)
            except (InputError, RegistryUnavailable) as error:  # what answers now goes on answering
                _log.warning("%s stays: %s", self._served.words if self._served else "nothing", masked(str(error)))
            except Exception:  # noqa: BLE001 - whatever it was, the next look may find better
                _log.exception("%s stays", self._served.words if self._served else "nothing")


def models(config: ServerConfig, name: str, model: str, **options: Any) -> Any:
    """Return the deployment of a model, a GPU a replica where the cluster has as many, else its share of the cores.

    Args:
        config: of the server.
        name: of the deployment.
        model: see :class:`ModelServer`, as ``options``.
    """
    known = ray.cluster_resources() if ray.is_initialized() else {}
    share = known.get("CPU", 1) / config.replicas
    cores = _BOOKED * share / (2 if config.has_challenger else 1)
    deployment = serve.deployment(
        name=name,
        num_replicas=config.replicas,
        max_ongoing_requests=64,
        health_check_period_s=2,  # a lost replica is started again soon
        health_check_timeout_s=60,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        ray_actor_options={"num_cpus": cores, "num_gpus": 1 if known.get("GPU", 0) >= config.replicas else 0},
    )
    threads = min(max(int(share), 1), _MOST_THREADS)
    return deployment(ModelServer).bind(config, model, threads=threads, **options)
