"""The main job: every stage in order, raw records to registry."""

from __future__ import annotations

from typing import Any

from jobs import release, stages, tables
from jobs.config import RunConfig
from jobs.run_folder import EXPORT, tracker_of
from pipeline.errors import HeldBack
from pipeline.progress import say


def retrain(config: RunConfig) -> dict[str, Any]:
    """Run every stage, raw records to registry, and show what came out.

    Raises:
        HeldBack: the gates did not let the candidate pass; everything else is done.
    """
    stages.train(config)
    trained, base = stages.evaluate(config)
    folders = stages.export(config)
    decision = release.promote(config)
    page = release.report(config)
    tracker_of(config).end()
    tables.show_evaluation(trained, base)
    tables.show_decision(decision)
    say(f"model   models:/{config.promotion.model_name}@champion in {config.tracking.uri}")
    say(f"exports {config.folder / EXPORT}: {', '.join(folder.name for folder in folders)}")
    say(f"report  {page}")
    if decision.verdict != "PROMOTE":
        raise HeldBack(f"{decision.verdict}: {'; '.join(decision.reasons)}")
    return {"verdict": decision.verdict, "version": decision.candidate, "report": str(page)}
