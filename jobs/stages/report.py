"""What the run's folder holds → one page."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from jobs.run import Run
from jobs.run_folder import BASE_EVALUATION, DECISION, DRIFT, EVALUATION
from jobs.scoring import BASE, OWN, Scored
from jobs.stages.compare import paired
from jobs.stages.register import identity
from pipeline.contracts import EvaluationReport
from pipeline.errors import InputError
from pipeline.evaluation.features import TaskFeatures, read_features
from pipeline.promotion.lineage import lineage
from pipeline.report import EvaluatedModel, ReportPage, write_report
from pipeline.report.adapter_view import adapter_view
from pipeline.report.examples import has_examples
from pipeline.stream import load_manifest, read_split
from pipeline.tracking import git_commit

_METHODS = {
    "mtl_lora": "MTL-LoRA",
    "lora": "LoRA",
    "lora_per_task": "one LoRA a task",
    "dora": "DoRA",
    "multilora": "MultiLoRA",
    "moelora": "MoELoRA",
}


def report(run: Run) -> Path:
    """Write the run's page from what its folder holds, and store it with the MLflow run.

    Raises:
        InputError: the run was not evaluated, or ``evaluation.lora_run`` was not, or not on the same samples.
    """
    folder, config = run.folder, run.config
    candidate = folder.read(EVALUATION)
    base, champion = folder.find(BASE_EVALUATION), _champion(run)
    own = Scored("candidate", candidate, folder.scores(OWN).scores)
    untrained = Scored("untrained base", candidate, folder.scores(BASE).scores)
    features, note = _features(run)
    page = ReportPage(
        run_name=config.name,
        manifest=load_manifest(config.manifest_path)[0],
        candidate=EvaluatedModel(candidate, own.scores()),
        champion=EvaluatedModel(champion.report, champion.scores()) if champion else None,
        base=EvaluatedModel(base, untrained.scores()) if base else None,
        decision=folder.find(DECISION),
        comparison=paired(run, own, champion or untrained),
        prompts=_prompts(run),
        images_of=partial(_images, run),
        history=run.history(),
        adapter=adapter_view(folder.adapter) if folder.adapter.is_dir() else None,
        features=features,
        features_note=note,
        drift=folder.find(DRIFT),
        lineage=_lineage(run),
        config=config.shown(),
    )
    write_report(folder.page, page)
    run.tracker().log_artifact(folder.page)
    return folder.page


def _prompts(run: Run) -> dict[tuple[str, str], str]:
    """Return what the samples ask of the tasks whose answers are shown, by task and key."""
    config = run.config
    texts = [task for task in config.tasks if has_examples(task)]
    return {
        (task.name, sample.key): task.template.format_map(sample.fields)
        for task in texts
        for sample in read_split(config.manifest_path, config.evaluation.split, task=task.name, cache=config.cache)
    }


def _images(run: Run, task: str, keys: Collection[str]) -> dict[str, bytes]:
    """Return the images of some of a task's samples."""
    config = run.config
    samples = read_split(config.manifest_path, config.evaluation.split, task=task, cache=config.cache)
    return {sample.key: sample.image for sample in samples if sample.key in keys and sample.image is not None}


def _champion(run: Run) -> Scored | None:
    """Return the champion that the run was compared with, None where there was none."""
    decision = run.folder.find(DECISION)
    number = decision.champion if decision and decision.champion != decision.candidate else None
    # Runs of earlier releases have the champion's scores under this name.
    for slot in (f"{run.registry.name}-{number}", "champion"):
        files = run.folder.scores(slot)
        if number is not None and files.report.is_file():
            return Scored("champion", EvaluationReport.read(files.report), files.scores)
    return None


def _lineage(run: Run) -> dict[str, Any]:
    """Return what the registry says of the run's version, or, before there is one, what the version would say."""
    made = run.registry.find(identity(run)) if run.folder.adapter.is_dir() else None
    if made is not None:
        return lineage(run.registry, made.number).rows()
    return {
        "manifest_sha256": run.samples["manifest_sha256"],
        "git_commit": git_commit(),
        "config_sha256": run.config.digest(),
    }


def _features(run: Run) -> tuple[dict[str, TaskFeatures], str]:
    """Return the task features of LoRA, or of the untrained base, and of this run, with what to say of them."""
    from pipeline.modeling.adapter import adapter_description  # torch, which only this needs

    ours = run.folder.scores(OWN).features
    if not ours.is_file():
        return {}, ""
    mine, name = read_features(ours), _METHODS[run.config.adapter.method]
    rival = run.config.evaluation.lora_run
    if rival is None:
        base = read_features(run.folder.scores(BASE).features)
        note = "Beside it the untrained base, since no run of LoRA on the same data was named (evaluation.lora_run)."
        return {"Untrained base": base, f"{name}, trained": mine}, note
    other = run.other(rival).folder
    path = other.scores(OWN).features
    run.folder.needs(path, f"evaluate, in the run {rival}, evaluation.lora_run of this one,")
    theirs = read_features(path)
    if (theirs.tasks, theirs.keys) != (mine.tasks, mine.keys):
        raise InputError(
            f"evaluation.lora_run must have scored the same samples as this run, {rival!r} has not; "
            "prepare it with the same data and seed"
        )
    method = adapter_description(other.adapter)["method"]
    return {f"{_METHODS[method]}, run {rival}": theirs, f"{name}, this run": mine}, ""
