"""Checks of what a run speaks with: the Ray cluster, MLflow's runs and its registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jobs.config import RunConfig
from jobs.doctor.finding import Finding, first_line
from jobs.doctor.machine import ports
from pipeline.errors import HeldBack, InputError
from pipeline.orchestration.environment import address_of


def ray_cluster(config: RunConfig) -> Iterator[Finding]:
    """Join the cluster that is named, or start a local one and end it; ports are looked at before it takes some."""
    yield from ports()
    address = address_of(config.ray.address)
    try:
        if address.startswith("http"):
            from jobs.cluster.ray_jobs import Jobs

            Jobs(address)
            yield Finding("Ray", f"the dashboard at {address} answers")
            return
        from pipeline.orchestration.cluster import capacity

        has = capacity(config.ray)
    except (InputError, OSError, RuntimeError) as error:
        named = "start it, or check ray.address, RAY_ADDRESS and RAY_AUTH_TOKEN"
        remedy = named if address not in ("", "local") else "free memory and /dev/shm, and let it listen on 127.0.0.1"
        yield Finding("Ray", first_line(error), "fail", remedy)
        return
    where = f"the cluster {address} answers" if address not in ("", "local") else "a local cluster starts and ends"
    has_words = ", ".join(f"{has[name]:g} {name}s" for name in ("CPU", "GPU") if has.get(name))
    ranks = config.training.num_workers
    if ranks > max(has.get("GPU", 0), has.get("CPU", 0)):
        remedy = f"add workers, or lower training.num_workers from {ranks}"
        yield Finding("Ray", f"{where}; it has {has_words} for {ranks} ranks", "fail", remedy)
        return
    yield Finding("Ray", f"{where}, {has_words}")


def registry(config: RunConfig) -> Iterator[Finding]:
    """Ask MLflow for the experiment, write to the registry, and read the champion's files to their end."""
    uri, shown, name = config.tracking.uri, config.tracking.shown, config.promotion.model_name
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        yield Finding("tracking", f"{shown} is not there yet; the first run makes it")
        return
    from pipeline.promotion.access import champion_loads, experiment_state, try_write
    from pipeline.promotion.versions import RegistryUnavailable

    reach = "start the server, and check tracking.uri, MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and …_PASSWORD"
    for what, remedy, check in (
        ("tracking", reach, lambda: f"{shown}: {experiment_state(uri, config.tracking.experiment)}"),
        ("registry", "give this user the right to edit the registered model", lambda: try_write(uri, name)),
        (
            "champion",
            "restore the files, or mtl-lora rollback to a version that loads",
            lambda: champion_loads(uri, name),
        ),
    ):
        try:
            yield Finding(what, check())
        except (InputError, RegistryUnavailable, HeldBack) as error:
            yield Finding(what, first_line(error), "fail", remedy)
            if what == "tracking":
                return  # the others would say the same
