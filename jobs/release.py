"""From an evaluated run to the registry: register, compare, decide, promote, report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, TypeVar

from jobs.config import RunConfig
from jobs.run_folder import ADAPTER, DECISION, DRIFT, RUN, history, needs, tracker_of
from jobs.stages import scored, scoring_pool, standing_report
from pipeline import orchestration
from pipeline.contracts import Comparison, Contract, EvaluationReport, PromotionDecision, write_atomic
from pipeline.evaluation import read_scores
from pipeline.evaluation.compare import compare as compare_scores
from pipeline.evaluation.report import write_report
from pipeline.ingestion import DriftReport
from pipeline.progress import say
from pipeline.promotion.card import model_card
from pipeline.promotion.lineage import lineage
from pipeline.promotion.policy import decide
from pipeline.promotion.registry import Registry, Version
from pipeline.stream import load_manifest, manifest_sha256
from pipeline.tracking import git_commit

C = TypeVar("C", bound=Contract)


def promote(config: RunConfig) -> PromotionDecision:
    """Register the adapter as challenger, score the champion on the same samples, decide, and move the alias.

    Raises:
        InputError: the run was not evaluated.
    """
    needs(config.folder / "evaluation.json", "evaluate")
    candidate = EvaluationReport.read(config.folder / "evaluation.json")
    base = EvaluationReport.read(config.folder / "evaluation_base.json")
    registry = Registry(config.promotion.model_name, config.tracking.uri)
    version = _registered(config, registry, candidate)
    champion = registry.champion()
    if champion is not None and champion.number == version.number:
        say(f"version {version.number} of {registry.name} is champion already")
        return PromotionDecision.read(config.folder / DECISION)
    opponent = None if champion is None else _score_champion(config, registry, champion.number)
    paired = None if champion is None else _against(config, "champion", str(champion.number), str(version.number))
    decision = decide(candidate, base, opponent, config.promotion.gates, against_champion=paired).model_copy(
        update={"candidate": str(version.number), "champion": str(champion.number) if champion else None}
    )
    decision.write(config.folder / DECISION)
    tracker_of(config).set_tags({"verdict": decision.verdict, "model_version": str(version.number)})
    if decision.verdict == "PROMOTE":
        registry.promote(version.number, decision)
    return decision


def _against(config: RunConfig, suffix: str, reference: str, candidate: str) -> Comparison:
    """Compare this run's scores with those of another model on the same samples, in pairs."""
    data = {"manifest_sha256": manifest_sha256(config.manifest_path), "split": config.evaluation.split}
    return compare_scores(
        read_scores(config.folder / "scores.parquet"),
        read_scores(config.folder / f"scores_{suffix}.parquet"),
        config.tasks,
        candidate_name=candidate,
        reference_name=reference,
        data=data,
        seed=config.seed,
    )


def compare(config: RunConfig) -> Comparison:
    """Compare this run with the champion on the run's test samples; with the untrained base where there is none.

    Raises:
        InputError: the run was not evaluated.
    """
    needs(config.folder / "scores.parquet", "evaluate")
    registry = Registry(config.promotion.model_name, config.tracking.uri)
    champion = registry.champion()
    if champion is None:
        return _against(config, "base", "untrained base", config.name)
    _score_champion(config, registry, champion.number)
    return _against(config, "champion", f"champion, version {champion.number}", config.name)


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
    mark = config.folder / RUN
    known = json.loads(mark.read_text())
    tracker = tracker_of(config)
    if known.get("version") and known.get("mlflow_uri") == config.tracking.uri:
        return registry.version(known["version"])
    made = registry.find({"run": config.name, "config_sha256": config.digest()})
    if made is not None:  # registered by a process that was killed right after
        write_atomic(mark, json.dumps(known | {"version": made.number}) + "\n")
        return made
    from pipeline.modeling.base_model import fingerprint

    manifest = load_manifest(config.manifest_path)[0]
    tags = {
        "run": config.name,
        "config_sha256": config.digest(),
        "window": "..".join(manifest.window) if manifest.window else "",
        "manifest_sha256": manifest_sha256(config.manifest_path),
        "base_fingerprint": fingerprint(config.model),
        "git_commit": git_commit(),
        "macro": f"{report.macro.value}",
        "tasks": json.dumps([task.name for task in config.tasks]),
        "metrics": json.dumps({name: result.value for name, result in report.tasks.items()}),
        "trained_until": max((s.window[1] for s in manifest.shards if s.split == "train" and s.window), default=""),
    }
    base = f"{config.model.base}, {config.model.num_layers or 'all'} layers"
    card = model_card(config.promotion.model_name, config.tasks, base, report, tags)
    version = registry.register(config.folder / ADAPTER, run_id=tracker.run_id, tags=tags, card=card)
    write_atomic(mark, json.dumps(json.loads(mark.read_text()) | {"version": version.number}) + "\n")
    return version


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
    known_as = folder / "version"
    standing = standing_report(config, "champion")
    if standing is not None and known_as.is_file() and known_as.read_text() == str(number):
        return standing
    shutil.rmtree(folder, ignore_errors=True)
    predictor = registry.download(number, folder)
    spec = PredictorSpec.read(predictor / PREDICTOR_FILE)
    known = {task.name for task in spec.tasks}
    with orchestration.cluster(config.ray), scoring_pool(config, predictor) as pool:
        found = scored(config, pool, "trained", "champion", known)
    write_atomic(known_as, str(number))
    return found


def report(config: RunConfig) -> Path:
    """Write ``report.html`` from what the run's folder holds, and store it with the MLflow run."""
    needs(config.folder / "evaluation.json", "evaluate")
    candidate = EvaluationReport.read(config.folder / "evaluation.json")
    path = config.folder / "report.html"
    manifest = load_manifest(config.manifest_path)[0]
    write_report(
        path,
        run_name=config.name,
        config=config.model_dump(mode="json"),
        manifest=manifest,
        candidate=candidate,
        base=_known(EvaluationReport, config.folder / "evaluation_base.json"),
        champion=_known(EvaluationReport, config.folder / "evaluation_champion.json"),
        decision=_known(PromotionDecision, config.folder / DECISION),
        scores=read_scores(config.folder / "scores.parquet"),
        base_scores=read_scores(config.folder / "scores_base.parquet"),
        history=history(config),
        drift=_known(DriftReport, config.folder / DRIFT),
        lineage={
            "manifest_sha256": manifest_sha256(config.manifest_path),
            "git_commit": git_commit(),
            "config_sha256": config.digest(),
        },
    )
    tracker_of(config).log_artifact(path)
    return path


def _known(contract: type[C], path: Path) -> C | None:
    return contract.read(path) if path.is_file() else None
