"""A function over many items, as Ray tasks where a cluster is there."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pipeline.orchestration.config import RayConfig
from pipeline.orchestration.environment import address_of, inside_job

_END_S = 30.0
In = TypeVar("In")
Out = TypeVar("Out")


def mapper(config: RayConfig, alone_s: float = 3.0) -> Callable[[Callable[[In], Out], Iterable[In]], Iterable[Out]]:
    """Return what applies a function to many items: Ray tasks where a cluster is there or named, else ``map``.

    Results come in the order of the items; an error in a task is raised as it was raised there, and ends the others.
    Functions must bear being run again: a task of a lost worker is.

    Args:
        config: the cluster.
        alone_s: so many seconds this process works alone before it asks the cluster: workers would not have started
            sooner. With 0 it leaves all work to them.
    """
    address = address_of(config.address)
    # Ray takes a second to import, which a preparation on this machine alone need not wait for.
    begun = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if not begun and not inside_job() and (not address or address.startswith("http")):
        return map

    def over_the_cluster(function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
        import ray

        from pipeline.orchestration.cluster import cluster

        with cluster(config):
            rest, end = iter(items), time.monotonic() + alone_s
            nothing: Any = object()
            while time.monotonic() < end:
                if (item := next(rest, nothing)) is nothing:
                    return
                yield function(item)
            # Ray's default fills the driver's machine before it asks another; reading wants every machine's network.
            task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(function)
            yield from _in_order(task, rest, 2 * int(ray.cluster_resources()["CPU"]))

    return over_the_cluster


def _in_order(task: Any, items: Iterable[Any], most: int) -> Iterator[Any]:
    import ray

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
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
