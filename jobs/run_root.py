"""The root of all runs where it is a URL: what a configuration holds of it on each machine, and what it calls it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.mirror import working_folder
from pipeline.storage import check_target, is_remote


def on_this_machine(values: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return a configuration's values with this machine's working copy for a ``run_root`` that is a URL, and the URL.

    Raises:
        ValueError: the root cannot be written to, or ``training.warm_start`` is a URL that is not under it.
    """
    root = str(values.get("run_root", ""))
    if not is_remote(root):
        return dict(values), None
    store = check_target(root.rstrip("/"), "runs")
    changed: dict[str, Any] = {"run_root": working_folder(store)}
    training = values.get("training")
    if isinstance(training, Mapping) and is_remote(warm := str(training.get("warm_start", ""))):
        if not warm.startswith(f"{store}/"):
            raise ValueError(
                f"training.warm_start must be a folder under run_root, {store!r}, or a path that all nodes have, "
                f"got {warm!r}; copy it there"
            )
        changed["training"] = {**training, "warm_start": changed["run_root"] / warm.removeprefix(f"{store}/")}
    return {**values, **changed}, store


def as_named(place: str | None, store: str | None, copy: Path) -> str | None:
    """Return a path by its URL where it lies in the working copy of a root that is one, else as it is."""
    if place is None or store is None or not Path(place).is_relative_to(copy):
        return place
    return f"{store}/{Path(place).relative_to(copy).as_posix()}"
