"""From an evaluated run to the registry: register, compare, decide, promote, report."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from jobs.config import RunConfig
from jobs.references import scores_of
from jobs.run_folder import ADAPTER, DECISION, DRIFT, EXPORT, history, needs, tracker_of
from jobs.stages import evaluation_paths, scored, scoring_pool, standing_report
from pipeline import orchestration
from pipeline.contracts import Comparison, Contract, EvaluationReport, PromotionDecision, write_atomic
from pipeline.errors import HeldBack, InputError
from pipeline.evaluation import read_scores
from pipeline.evaluation.adapter_view import adapter_view
from pipeline.evaluation.compare import compare as compare_scores
from pipeline.evaluation.features import TaskFeatures, read_features
from pipeline.evaluation.parity import export_parity
from pipeline.evaluation.predict import spread
from pipeline.evaluation.report import write_report
from pipeline.ingestion import DriftReport
from pipeline.progress import say
from pipeline.promotion.card import model_card
from pipeline.promotion.lineage import lineage
from pipeline.promotion.policy import decide
from pipeline.promotion.registry import Registry, Version
from pipeline.stream import load_manifest, manifest_sha256, read_split
from pipeline.tracking import git_commit

C = TypeVar("C", bound=Contract)
Scored = tuple[str, pd.DataFrame]
"""A model's name in words, and its scores."""


def promote(config: RunConfig, before: Callable[[], None] | None = None) -> PromotionDecision:
    """Register the adapter as challenger, score the champion on the same samples, decide, and move the alias.

    Before the alias moves each exported task must answer as the adapter does, by PEFT alone; else the verdict is
    REJECT.

    Args:
        config: of the run.
        before: called at first and right before the alias moves; what it raises keeps it where it is.

    Raises:
        HeldBack: another champion has come since this one was compared.
        InputError: the run was not evaluated or not exported, or its shards are not those that were evaluated.
    """
    needs(config.folder / "evaluation.json", "evaluate")
    for task in config.tasks:
        needs(config.folder / EXPORT / task.name / "adapter_config.json", "export")
    candidate = EvaluationReport.read(config.folder / "evaluation.json")
    if candidate.data["manifest_sha256"] != manifest_sha256(config.manifest_path):
        raise InputError(
            f"the shards must be those that were evaluated, {config.manifest_path} are others; "
            "run first: mtl-lora evaluate with this --config"
        )
    base = EvaluationReport.read(config.folder / "evaluation_base.json")
    registry = Registry(config.promotion.model_name, config.tracking.uri)
    if before is not None:
        before()
    version = _registered(config, registry, candidate)
    champion = registry.champion()
    if champion is not None and champion.number == version.number:
        words = f"version {version.number} of {registry.name} is champion already"
        say(words)
        standing = _known(PromotionDecision, config.folder / DECISION)
        if standing is None:  # the folder was removed, and the same training came to the same weights
            number = str(version.number)
            standing = PromotionDecision(
                verdict="PROMOTE", reasons=(words,), candidate=number, champion=number, tasks={}
            )
            standing.write(config.folder / DECISION)
        return standing
    opponent = None if champion is None else _score_champion(config, registry, champion.number)
    paired = None if champion is None else _against(config, "champion", str(champion.number), str(version.number))
    decision = decide(candidate, base, opponent, config.promotion.gates, against_champion=paired).model_copy(
        update={"candidate": str(version.number), "champion": str(champion.number) if champion else None}
    )
    if decision.verdict == "PROMOTE" and (deposed := registry.deposed(version.number)) is not None:
        words = (
            f"version {version.number} was champion until {deposed.who} made version {deposed.version} champion at "
            f"{deposed.time:%Y-%m-%d %H:%M} UTC; to bring it back: mtl-lora rollback --to {version.number}"
        )
        decision = decision.model_copy(update={"verdict": "HOLD", "reasons": (words,)})
    if decision.verdict == "PROMOTE":
        decision = _held_to_exports(config, decision)
    decision.write(config.folder / DECISION)
    tracker_of(config).set_tags({"verdict": decision.verdict, "model_version": str(version.number)})
    if decision.verdict == "PROMOTE":
        if before is not None:
            before()
        registry.promote(version.number, decision)
    return decision


_PARITY_SAMPLES = 8
"""Holdout samples of each task on which its export is compared with the adapter."""


def _held_to_exports(config: RunConfig, decision: PromotionDecision) -> PromotionDecision:
    samples = spread(
        list(read_split(config.manifest_path, config.evaluation.split, cache=config.cache)), _PARITY_SAMPLES
    )
    exports = {task.name: config.folder / EXPORT / task.name for task in config.tasks}
    try:
        apart = max(export_parity(config.folder / ADAPTER, exports, samples).values())
    except HeldBack as refusal:
        return decision.model_copy(update={"verdict": "REJECT", "reasons": (str(refusal),)})
    words = (
        f"exports answer as the adapter does, {apart:.1g} apart at most in log-probability on {len(samples)} samples"
    )
    return decision.model_copy(update={"reasons": (*decision.reasons, words)})


def _against(config: RunConfig, suffix: str, reference: str, candidate: str) -> Comparison:
    """Compare this run's scores with those of another model on the same samples, in pairs."""
    ours, theirs = (read_scores(evaluation_paths(config, end)[0]) for end in ("", suffix))
    return _compared(config, (candidate, ours), (reference, theirs))


def _compared(config: RunConfig, candidate: Scored, reference: Scored) -> Comparison:
    return compare_scores(
        candidate[1],
        reference[1],
        config.tasks,
        candidate_name=candidate[0],
        reference_name=reference[0],
        data={"manifest_sha256": manifest_sha256(config.manifest_path), "split": config.evaluation.split},
        seed=config.seed,
    )


def compare(config: RunConfig, candidate: str | None = None, reference: str | None = None) -> Comparison:
    """Compare any two models on the run's test samples.

    Args:
        config: of the run whose test samples are scored.
        candidate: see :data:`jobs.references.FORMS`; the run itself by default.
        reference: the same; the champion by default, the untrained base where there is none.

    Raises:
        InputError: the run was not evaluated, or there is no such model.
    """
    if candidate is None:
        needs(config.folder / "scores.parquet", "evaluate")
    ours = scores_of(config, candidate or f"run:{config.name}")
    if reference is None:
        champion = Registry(config.promotion.model_name, config.tracking.uri).champion()
        reference = str(champion.number) if champion else "base"
    return _compared(config, ours, scores_of(config, reference))


def rollback(config: RunConfig, to: str | None, why: str) -> dict[str, Any]:
    """Make the champion before this one, or a named version, champion again.

    Raises:
        InputError: there is no such version, or it does not load.
    """
    entry = Registry(config.promotion.model_name, config.tracking.uri).rollback(to, why)
    return {"model": config.promotion.model_name, "champion": entry.version, "instead_of": entry.previous}


def lineage_of(config: RunConfig, reference: str) -> dict[str, Any]:
    """Return which data, code and parent made a version, or the champion of a day; say it too."""
    rows = lineage(Registry(config.promotion.model_name, config.tracking.uri), reference).rows()
    for name, value in rows.items():
        say(f"{name:>18}  {value}")
    return rows


def _registered(config: RunConfig, registry: Registry, report: EvaluationReport) -> Version:
    """Return this run's version in the registry, registering it the first time."""
    tracker = tracker_of(config)
    if (made := registry.find(_identity(config))) is not None:
        registry.challenge(made.number)
        return made
    from pipeline.modeling.base_model import fingerprint

    manifest = load_manifest(config.manifest_path)[0]
    tags = {
        **_identity(config),
        "window": "..".join(manifest.window) if manifest.window else "",
        "base_fingerprint": fingerprint(config.model),
        "git_commit": git_commit(),
        "macro": f"{report.macro.value}",
        "tasks": json.dumps([task.name for task in config.tasks]),
        "metrics": json.dumps({name: result.value for name, result in report.tasks.items()}),
        "trained_until": max((s.window[1] for s in manifest.shards if s.split == "train" and s.window), default=""),
    }
    base = f"{config.model.base}, {config.model.num_layers or 'all'} layers"
    card = model_card(config.promotion.model_name, config.tasks, base, report, tags)
    return registry.register(config.folder / ADAPTER, run_id=tracker.run_id, tags=tags, card=card)


def _identity(config: RunConfig) -> dict[str, str]:
    """Return the tags that tell this run's version from every other: its name, settings, data and weights."""
    with (config.folder / ADAPTER / "adapter_model.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "run": config.name,
        "config_sha256": config.digest(),
        "manifest_sha256": manifest_sha256(config.manifest_path),
        "adapter_sha256": weights,
    }


def check_champion(config: RunConfig, champion: Version, max_drop: float) -> PromotionDecision | None:
    """Score the champion on the newest days before anything is trained; hold where it fell too far.

    A champion that answers last week's traffic and fails on this week's speaks of changed labels or data: a candidate
    trained on them would win on them too.

    Args:
        config: of the run, prepared.
        champion: the present one.
        max_drop: how far a task's metric may lie below what it was when the champion was promoted: its whole 95 %
            interval must not lie lower.

    Returns:
        The decision to hold, None where all is well.
    """
    found = _score_champion(config, Registry(config.promotion.model_name, config.tracking.uri), champion.number)
    before = json.loads(champion.tags.get("metrics", "{}"))
    reasons = {}
    for name, result in found.tasks.items():
        then = before.get(name)
        if then is not None and result.ci95 is not None and result.ci95[1] < then - max_drop:
            reasons[name] = (
                f"the champion scored {then:.3f} when it was promoted and {result.value:.3f} "
                f"[{result.ci95[0]:.3f}, {result.ci95[1]:.3f}] on the newest days, a fall of more than {max_drop:g}: "
                "its labels or data have changed"
            )
    if not reasons:
        return None
    return PromotionDecision(
        verdict="HOLD",
        reasons=tuple(f"{name}: {words}" for name, words in reasons.items()),
        candidate="none trained",
        champion=str(champion.number),
        tasks={name: reasons.get(name, "as before") for name in found.tasks},
    )


def _score_champion(config: RunConfig, registry: Registry, number: int) -> EvaluationReport:
    """Score the present champion on this run's test samples, for the tasks that it knows."""
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec

    folder = config.folder / "champion"
    known_as, name = folder / "version", f"{registry.place}/{number}"
    standing = standing_report(config, "champion")
    if standing is not None and known_as.is_file() and known_as.read_text() == name:
        return standing
    shutil.rmtree(folder, ignore_errors=True)
    predictor = registry.download(number, folder)
    spec = PredictorSpec.read(predictor / PREDICTOR_FILE)
    known = {task.name for task in spec.tasks}
    with orchestration.cluster(config.ray), scoring_pool(config, predictor) as pool:
        found = scored(config, pool, "trained", "champion", known)
    write_atomic(known_as, name)
    return found


def report(config: RunConfig) -> Path:
    """Write ``report.html`` from what the run's folder holds, and store it with the MLflow run.

    Raises:
        InputError: the run was not evaluated, or ``evaluation.lora_run`` was not, or not on the same samples.
    """
    needs(config.folder / "evaluation.json", "evaluate")
    path, champion = config.folder / "report.html", _known(EvaluationReport, evaluation_paths(config, "champion")[1])
    opponent = "champion" if champion else "base"
    scores = {end: evaluation_paths(config, end)[0] for end in ("", "base", "champion")}
    view = adapter_view(config.folder / ADAPTER) if (config.folder / ADAPTER).is_dir() else None
    features, note = _features(config)
    write_report(
        path,
        run_name=config.name,
        config=config.shown(),
        manifest=load_manifest(config.manifest_path)[0],
        candidate=EvaluationReport.read(config.folder / "evaluation.json"),
        base=_known(EvaluationReport, config.folder / "evaluation_base.json"),
        champion=champion,
        decision=_known(PromotionDecision, config.folder / DECISION),
        scores=read_scores(scores[""]),
        base_scores=read_scores(scores["base"]),
        champion_scores=read_scores(scores["champion"]) if champion else None,
        history=history(config),
        mixing=view.mixing if view else None,
        lambda_distance=view.lambda_distance if view else None,
        lineage=_lineage(config),
        comparison=_against(config, opponent, "champion" if champion else "untrained base", "candidate"),
        drift=_known(DriftReport, config.folder / DRIFT),
        features=features,
        features_note=note,
    )
    tracker_of(config).log_artifact(path)
    return path


def _lineage(config: RunConfig) -> dict[str, Any]:
    """Return what the registry says of the run's version, or, before there is one, what the version would say."""
    registry = Registry(config.promotion.model_name, config.tracking.uri)
    made = registry.find(_identity(config)) if (config.folder / ADAPTER).is_dir() else None
    if made is not None:
        return lineage(registry, made.number).rows()
    return {
        "manifest_sha256": manifest_sha256(config.manifest_path),
        "git_commit": git_commit(),
        "config_sha256": config.digest(),
    }


_METHODS = {"mtl_lora": "MTL-LoRA", "lora": "LoRA", "dora": "DoRA", "multilora": "MultiLoRA", "moelora": "MoELoRA"}


def _features(config: RunConfig) -> tuple[dict[str, TaskFeatures] | None, str]:
    """Return the task features of LoRA, or of the untrained base, and of this run, with what to say of them."""
    ours = evaluation_paths(config, "")[2]
    if not ours.is_file():
        return None, ""
    mine, name = read_features(ours), _METHODS[config.adapter.method]
    rival = config.evaluation.lora_run
    if rival is None:
        base = read_features(evaluation_paths(config, "base")[2])
        note = "Beside it the untrained base, since no run of LoRA on the same data was named (evaluation.lora_run)."
        return {"Untrained base": base, f"{name}, trained": mine}, note
    path = config.run_root / rival / ours.name
    needs(path, f"evaluate, in the run {rival}, evaluation.lora_run of this one,")
    theirs = read_features(path)
    if (theirs.tasks, theirs.keys) != (mine.tasks, mine.keys):
        raise InputError(
            f"evaluation.lora_run must have scored the same samples as this run, {rival!r} has not; "
            "prepare it with the same data and seed"
        )
    method = json.loads((config.run_root / rival / ADAPTER / "mtl_lora_config.json").read_text())["method"]
    return {f"{_METHODS[method]}, run {rival}": theirs, f"{name}, this run": mine}, ""


def _known(contract: type[C], path: Path) -> C | None:
    return contract.read(path) if path.is_file() else None
