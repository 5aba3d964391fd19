"""The search: a plan of its cost, the trials, then curves, a table and the best configuration as YAML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.config import RunConfig
from jobs.main_job import run_stage
from jobs.run import Run
from jobs.stages.plan import training_job
from jobs.tuning.cost import calibrated_plan, search_cost
from jobs.tuning.table import show_trials
from jobs.tuning.trials import Outcome, Search, best_outcome, curve
from pipeline.contracts import write_atomic
from pipeline.progress import Track, say
from pipeline.tracking import PARENT, Tracker, send_history

BEST, PAGE = "best.yaml", "tune.html"
"""Names in the search's folder."""


def tune(config: RunConfig, dry_run: bool = False) -> dict[str, Any]:
    """Search as the configuration's ``tune`` section asks; trials that are over stand, others go on where they were.

    Args:
        config: that is searched around.
        dry_run: only say what the search will take.

    Returns:
        The best trial, what it reached, its values, and where its configuration and the page are.

    Raises:
        InputError: the search or a trial's configuration breaks a rule, another search stands in its folder, or no
            trial was measured.
    """
    search = Search(config)
    configs = search.trials()
    plan = run_stage(Run(config), "plan", calibrate=False)
    steps = [trial.training.num_steps(plan.epoch.samples) for trial in configs]
    if dry_run or not search.parent.folder.exists():  # a search that goes on has said it
        cost = search_cost(search.tune, steps, calibrated_plan(configs[0]), steps[0])
        say(f"{search.name}: {cost.words}")
        if dry_run:
            return cost.values()
    parent = Run(search.parent)
    parent.folder.bind(search.identity)
    tracker = parent.tracker()
    runs = [_child(search, trial, number, tracker) for number, trial in enumerate(configs)]
    _run(search, runs, steps)
    outcomes = [_outcome(search, run, number) for number, run in enumerate(runs)]
    return _finish(search, parent, outcomes)


def _child(search: Search, config: RunConfig, number: int, parent: Tracker) -> Run:
    """Return a trial's run, its configuration written and its MLflow run open under the search's."""
    drawn = {f"tune.{key}": str(value) for key, value in search.tune.drawn(number).items()}
    run = Run(config, tags={PARENT: parent.run_id, "trial": str(number), **drawn})
    config.write()
    run.tracker()
    return run


def _run(search: Search, runs: Sequence[Run], steps: Sequence[int]) -> None:
    """Run the trials that are not over; without any, no Ray is started."""
    from pipeline.orchestration.cluster import cluster
    from pipeline.orchestration.tuning import Trial, ended, run_trials

    if all(ended(run.folder.path) is not None for run in runs):
        return
    tune = search.tune
    trials = [
        Trial(training_job(run.config), run.folder.path, run.tracker(), num)
        for run, num in zip(runs, steps, strict=True)
    ]
    asha = None if tune.asha is None else (tune.asha.grace_steps, tune.asha.reduction)
    with cluster(search.config.ray), Track("tune", sum(steps), "steps") as track:
        done = [0] * len(runs)

        def told(trial: int, step: int | None) -> None:
            now = steps[trial] if step is None else step
            if now > done[trial]:
                grown, done[trial] = now - done[trial], now
                track.advance(grown, f"trial {trial}" + (" is over" if step is None else ""))

        state = search.parent.folder / ".ray"
        run_trials(trials, state, tune.metric, asha, tune.max_concurrent, told)


def _outcome(search: Search, run: Run, number: int) -> Outcome:
    """Return what a trial has reached, and close its MLflow run."""
    from pipeline.orchestration.tuning import ended

    found = ended(run.folder.path) or {"state": "failed", "reason": "it did not end; the same command goes on with it"}
    tracker = run.tracker()
    send_history(tracker, run.folder.history)
    tracker.set_tags({"state": found["state"]})
    tracker.end("FAILED" if found["state"] == "failed" else "FINISHED")
    measured = curve(run.history(), search.tune.metric)
    return Outcome(number, search.values(number), found["state"], measured, found["reason"])


def _finish(search: Search, parent: Run, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    best, folder = best_outcome(outcomes), parent.folder.path
    show_trials(outcomes, best, search.tune.metric)
    write_atomic(folder / BEST, search.best(best.number).as_yaml())
    _write_page(folder / PAGE, search, outcomes, best)
    tracker = parent.tracker()
    tracker.log_metrics({f"best/{search.tune.metric}": best.best if best.best is not None else math.nan}, best.number)
    tracker.set_tags({"best_trial": search.trial_name(best.number)})
    for path in (folder / BEST, folder / PAGE):
        tracker.log_artifact(path)
    tracker.end()
    say(f"next: mtl-lora train --config {folder / BEST}")
    return {
        "best_trial": best.number,
        search.tune.metric: best.best,
        "values": dict(best.values),
        "states": [outcome.state for outcome in outcomes],
        "config": str(folder / BEST),
        "page": str(folder / PAGE),
    }


def _write_page(path: Path, search: Search, outcomes: Sequence[Outcome], best: Outcome) -> None:
    from pipeline.report.search_page import SearchPage, TrialRow, write_search_page

    rows = [TrialRow(o.number, dict(o.values), o.state, tuple(o.curve), o.best, o.reason) for o in outcomes]
    write_search_page(
        path,
        SearchPage(search.name, search.tune.metric, tuple(rows), best.number, search.best(best.number).as_yaml()),
    )
