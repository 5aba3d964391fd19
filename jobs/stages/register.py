"""Evaluated adapter → a version of the registered model, the challenger."""

from __future__ import annotations

import json

from jobs.run import Run
from jobs.scoring import weights_sha256
from jobs.stages.evaluate import Evaluation
from pipeline.promotion.card import model_card
from pipeline.promotion.registry import Version
from pipeline.stream import load_manifest
from pipeline.tracking import git_commit


def register(run: Run, evaluation: Evaluation) -> Version:
    """Register the adapter as challenger; the version that this training made already stands.

    Args:
        run: that trained it.
        evaluation: what it scored.
    """
    run.may_go_on()
    tracker = run.tracker()
    if (made := run.registry.find(identity(run))) is not None:
        run.registry.challenge(made.number)
        return made
    from pipeline.modeling.base_model import fingerprint

    config, report = run.config, evaluation.trained
    manifest = load_manifest(config.manifest_path)[0]
    tags = {
        **identity(run),
        "window": "..".join(manifest.window) if manifest.window else "",
        "base_fingerprint": fingerprint(config.model),
        "git_commit": git_commit(),
        "macro": f"{report.macro.value}",
        "tasks": json.dumps([task.name for task in config.tasks]),
        "metrics": json.dumps({name: result.value for name, result in report.tasks.items()}),
        "trained_until": max((s.window[1] for s in manifest.shards if s.split == "train" and s.window), default=""),
    }
    base = f"{config.model.base}, {config.model.num_layers or 'all'} layers"
    card = model_card(run.registry.name, config.tasks, base, report, tags)
    return run.registry.register(run.folder.adapter, run_id=tracker.run_id, tags=tags, card=card)


def identity(run: Run) -> dict[str, str]:
    """Return what tells this run's version from every other: its name, settings, data and weights."""
    return {
        "run": run.config.name,
        "config_sha256": run.config.digest(),
        "manifest_sha256": run.samples["manifest_sha256"],
        "adapter_sha256": weights_sha256(run.folder.adapter),
    }
