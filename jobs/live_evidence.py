"""Labels of live requests: kept when they come, held against a canary, and evidence for who becomes champion."""

from __future__ import annotations

from typing import Any

from jobs.config import RunConfig
from jobs.notices import notify
from jobs.run import Run, root_file
from pipeline.contracts import Comparison
from pipeline.errors import InputError
from pipeline.evaluation.compare import compare
from pipeline.promotion.gates import LiveConfig
from pipeline.promotion.registry import Version
from pipeline.serving.live_log import add_labels, labelled, pairs, take_back
from pipeline.serving.traffic import miscalibrated


def live_comparison(run: Run, version: Version, champion: Version) -> Comparison | None:
    """Compare a challenger with the champion on labelled live rows that both have scored; None where there is none.

    Raises:
        InputError: a label is none of its task.
    """
    name, live = run.registry.name, _live(run.config)
    numbers = [f"models:/{name}/{one.number}" for one in (version, champion)]
    ours, theirs = pairs(labelled(live.log, run.config.tasks), *numbers)
    if ours.empty:
        return None
    return compare(
        ours,
        theirs,
        run.config.tasks,
        candidate_name=str(version.number),
        reference_name=str(champion.number),
        data={"live": live.log},
        seed=run.config.seed,
    )


def feedback(config: RunConfig, labels: str) -> dict[str, Any]:
    """Keep labels, and take back a canary that they show to be miscalibrated.

    Args:
        config: names the log, tasks and limits.
        labels: record files.

    Returns:
        ``labels``: how many came; ``rows``: version → scored rows that have one now; ``taken_back``: version → reason.

    Raises:
        InputError: a label names no row, or is none of its task.
    """
    live = _live(config)
    count = add_labels(live.log, labels)
    found = labelled(live.log, config.tasks)
    binary = [task.name for task in config.tasks if task.kind == "binary"]
    canary, taken_back = found[(found["role"] == "canary") & found["task"].isin(binary)], {}
    for model, rows in canary.groupby("model"):
        scores, classes = ({name: part[c].tolist() for name, part in rows.groupby("task")} for c in ("score", "label"))
        why = miscalibrated(scores, classes, live.min_samples, live.calibration_ratio)
        if why is not None:
            taken_back[str(model)] = why
            take_back(live.log, str(model), why)
            name, version = config.promotion.model_name, str(model)
            with root_file(config, "notices.jsonl") as log:
                notify(config.notices, log, "TAKEN_BACK", [why], model=name, version=version)
    return {"labels": count, "rows": found["model"].value_counts().to_dict(), "taken_back": taken_back}


def _live(config: RunConfig) -> LiveConfig:
    if config.promotion.live is None:
        raise InputError(
            "promotion.live must say where the live scores are kept, got null; set promotion.live.log to the folder "
            "that serve was given"
        )
    return config.promotion.live
