"""A study's figures: each arm of its first suite trained once more at its chosen rate, looked into and timed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobs.study.trials import UNTRAINED
from jobs.study_config import StudyConfig
from pipeline.contracts import write_atomic
from pipeline.errors import InputError
from pipeline.json_text import parse_json
from pipeline.progress import Track

if TYPE_CHECKING:
    from jobs.study.work import Work
    from pipeline.study.trial import StudyTrial

FIGURES = "figures.json"
"""In the study's folder; the page shows what is in it."""
_PER_TASK, _BATCHES = 60, (1, 4, 16)
_CONFLICT_STEPS = 10
"""Between two measurements of the cosines between the tasks' gradients."""


def write_figures(config: StudyConfig, work: Work) -> None:
    """Write features, sharing and latency of a suite's arms; an arm whose features stand is not trained again.

    Args:
        config: of the study.
        work: of the suite; only arms with a chosen rate take part in the features.

    Raises:
        InputError: no arm has a chosen rate yet.
    """
    from pipeline.evaluation.predict import evenly_spaced
    from pipeline.stream import read_split
    from pipeline.study.figures import features_of, latency, projected, sharing_of
    from pipeline.study.trial import trained

    path = config.folder / FIGURES
    known: dict[str, Any] = parse_json(path.read_text()) if path.is_file() else {}
    samples = evenly_spaced(list(read_split(work.suite.manifest, "test")), _PER_TASK)
    chosen = {arm: found.chosen for arm in config.arms_of(work.suite.name) if (found := work.search(arm)).chosen}
    if not chosen:
        raise InputError("figures are of arms whose rate is chosen, got none yet; run the study first")
    tasks = [task.name for task in work.suite.config(UNTRAINED, config.learning_rates[0], 0).tasks]
    features, sharing = (list[dict[str, Any]](known.get(key, {}).get("arms", ())) for key in ("features", "sharing"))
    suite = f"Suite {work.suite.name}, seed {config.seeds[0]}"
    with Track("figures", len(chosen) + 1, "arms") as track:
        for arm, rate in chosen.items():
            title = config.arms[arm].title or arm
            if any(title not in [found["title"] for found in shown] for shown in (features, sharing)):
                trial = _measuring_conflict(work.suite.trial(arm, rate, config.seeds[0], "test"))
                adapted, encoder, row = trained(trial)
                features = _with(features, features_of(title, projected(adapted, encoder, samples), samples))
                sharing = _with(sharing, sharing_of(title, adapted, row["history"]))
                note = f"{suite}; apart by construction where the task is told."
                known["features"] = {"note": note, "tasks": tasks, "arms": features}
                note = f"{suite}; cosines between the gradients of what tasks share, mean over the training's batches."
                known["sharing"] = {"note": note, "tasks": tasks, "arms": sharing}
                write_atomic(path, json.dumps(known) + "\n")
            track.advance(1, title)
        trials = {arm: work.suite.trial(arm, rate, config.seeds[0], "test") for arm, rate in chosen.items()}
        plain = {config.arms[arm].title or arm: t.job.adapter for arm, t in trials.items() if _is_plain(config, arm)}
        job = work.suite.trial(UNTRAINED, config.learning_rates[0], 0, "test").job
        ratios = latency(job, plain, samples, _BATCHES)
        known["latency"] = {"note": "Time to answer over that of the base; adapters in all layers.", **ratios}
        write_atomic(path, json.dumps(known) + "\n")
        track.advance(1, "latency")


def _measuring_conflict(trial: StudyTrial) -> StudyTrial:
    """Return a run that measures cosines, too, where its tasks share anything."""
    if trial.job.adapter.method == "lora_per_task":
        return trial
    training = trial.job.training.model_copy(update={"conflict_steps": _CONFLICT_STEPS})
    return replace(trial, job=replace(trial.job, training=training))


def _with(arms: list[dict[str, Any]], found: dict[str, Any]) -> list[dict[str, Any]]:
    return [arm for arm in arms if arm["title"] != found["title"]] + [found]


def _is_plain(config: StudyConfig, arm: str) -> bool:
    return config.arms[arm].prompt == "plain"
