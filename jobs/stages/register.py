"""Evaluated adapter → a version of the registered model, the challenger."""

from __future__ import annotations

from dataclasses import asdict

from jobs.run import Run
from jobs.scoring import weights_sha256
from jobs.stages.evaluate import Evaluation
from pipeline.promotion.card import model_card
from pipeline.promotion.provenance import Identity, Provenance, days
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
    tracker.log_data(run.data_sets()["evaluation"])  # other samples than at first, where some were appended
    from pipeline.modeling.base_model import fingerprint

    config, report = run.config, evaluation.trained
    manifest = load_manifest(config.manifest_path)[0]
    provenance = Provenance(
        **asdict(identity(run)),
        tasks=tuple(task.name for task in config.tasks),
        window=days(manifest.window),
        trained_until=max(
            (w[1] for s in manifest.shards if s.split == "train" and (w := days(s.window))), default=None
        ),
        base=f"{config.model.base}, {config.model.num_layers or 'all'} layers"
        + (f", {config.model.quantization}" if config.model.quantization else ""),
        base_fingerprint=fingerprint(config.model),
        macro=report.macro.value,
        metrics={name: result.value for name, result in report.tasks.items()},
        holdout=report.data.get("keys_sha256", {}),
        git_commit=git_commit(),
    )
    card = model_card(run.registry.name, config.tasks, report, provenance)
    return run.registry.register(run.folder.adapter, run_id=tracker.run_id, provenance=provenance, card=card)


def identity(run: Run) -> Identity:
    """Return what tells this run's version from every other: its name, settings, data and weights."""
    return Identity(
        run=run.config.name,
        config_sha256=run.config.digest(),
        manifest_sha256=run.samples["manifest_sha256"],
        adapter_sha256=weights_sha256(run.folder.adapter),
    )
