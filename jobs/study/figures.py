"""A study's figures: each arm of its first suite trained once more at its chosen rate, looked into and timed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jobs.study.trials import UNTRAINED
from jobs.study_config import StudyConfig
from pipeline.contracts import write_atomic
from pipeline.errors import InputError
from pipeline.progress import Track

if TYPE_CHECKING:
    from jobs.study.work import Work

FIGURES = "figures.json"
"""In the study's folder; the page shows what is in it."""
_PER_TASK, _BATCHES = 60, (1, 4, 16)


def write_figures(config: StudyConfig, work: Work) -> None:
    """Write features and latency of a suite's arms; an arm whose features stand is not trained again.

    Args:
        config: of the study.
        work: of the suite; only arms with a chosen rate take part in the features.

    Raises:
        InputError: no arm has a chosen rate yet.
    """
    from pipeline.evaluation.predict import evenly_spaced
    from pipeline.stream import read_split
    from pipeline.study.figures import features_of, latency, projected
    from pipeline.study.trial import trained

    path = config.folder / FIGURES
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    samples = evenly_spaced(list(read_split(work.suite.manifest, "test")), _PER_TASK)
    chosen = {arm: found.chosen for arm in config.arms_of(work.suite.name) if (found := work.search(arm)).chosen}
    if not chosen:
        raise InputError("figures are of arms whose rate is chosen, got none yet; run the study first")
    tasks = [task.name for task in work.suite.config(UNTRAINED, config.learning_rates[0], 0).tasks]
    shown: list[dict[str, Any]] = known.get("features", {}).get("arms", [])
    with Track("figures", len(chosen) + 1, "arms") as track:
        for arm, rate in chosen.items():
            title = config.arms[arm].title or arm
            if title not in [found["title"] for found in shown]:
                adapted, encoder, _ = trained(work.suite.trial(arm, rate, config.seeds[0], "test"))
                shown.append(features_of(title, projected(adapted, encoder, samples), samples))
                note = f"Suite {work.suite.name}, seed {config.seeds[0]}; apart by construction where the task is told."
                known["features"] = {"note": note, "tasks": tasks, "arms": shown}
                write_atomic(path, json.dumps(known) + "\n")
            track.advance(1, title)
        trials = {arm: work.suite.trial(arm, rate, config.seeds[0], "test") for arm, rate in chosen.items()}
        plain = {config.arms[arm].title or arm: t.job.adapter for arm, t in trials.items() if _is_plain(config, arm)}
        job = work.suite.trial(UNTRAINED, config.learning_rates[0], 0, "test").job
        ratios = latency(job, plain, samples, _BATCHES)
        known["latency"] = {"note": "Time to answer over that of the base; adapters in all layers.", **ratios}
        write_atomic(path, json.dumps(known) + "\n")
        track.advance(1, "latency")


def _is_plain(config: StudyConfig, arm: str) -> bool:
    return config.arms[arm].prompt == "plain"
