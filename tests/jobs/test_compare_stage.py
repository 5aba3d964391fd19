"""A challenger is held against champion, anchor and untrained base; what is scored already needs no cluster."""

from __future__ import annotations

from pathlib import Path

from jobs.config import RunConfig
from jobs.run import Run
from jobs.scoring import BASE, OWN, UNTRAINED, weights_sha256
from jobs.stages.compare import compare
from pipeline.evaluation.score_table import write_scores
from pipeline.evaluation.summary import summarize
from pipeline.promotion.policy import decide
from pipeline.promotion.registry import Registry
from tests.pipeline.evaluation.simulated import scores
from tests.pipeline.promotion.conftest import PROMOTE, TASKS, registry, store, stored, write_adapter  # noqa: F401

NAME = "query_ad"


def _scored(run: Run, slot: str, weights: str, noise: float) -> None:
    files, frame = run.folder.scores(slot), scores(noise, seed=1, names=(NAME,))
    write_scores(files.scores, frame)
    data = run.samples | {"weights": weights}
    summarize(frame, TASKS[:1], model=slot, data=data, replicates=20).write(files.report)


def _promote(registry: Registry, number: int, champion: str | None, becomes: bool) -> None:  # noqa: F811
    known = {"candidate": str(number), "champion": champion, "anchor": champion, "becomes_anchor": becomes}
    registry.promote(number, PROMOTE.model_copy(update=known))


def test_the_evidence_holds_champion_anchor_base_and_looks(registry: Registry, tmp_path: Path) -> None:  # noqa: F811
    config = RunConfig(
        name="new",
        run_root=tmp_path,
        tasks=TASKS,
        data={"source": "records", "root": str(tmp_path)},
        tracking={"uri": registry.uri},
        promotion={"model_name": registry.name, "gates": {"gain": "none", "margin": 0.02}},
    )
    run = Run(config)
    Path(config.manifest_path).parent.mkdir(parents=True)
    Path(config.manifest_path).write_text("{}")
    write_adapter(run.folder.adapter)
    _promote(registry, 1, None, True)
    assert compare(run, registry.version(1)).evidence is None
    _promote(registry, 2, "1", False)
    weights = registry.version(1).adapter_sha256
    assert weights is not None
    for slot, sha256, noise in (
        (OWN, weights_sha256(run.folder.adapter), 1.1),
        (BASE, UNTRAINED, 9.0),
        (f"{registry.name}-1", weights, 0.6),
        (f"{registry.name}-2", weights, 0.9),
    ):
        _scored(run, slot, sha256, noise)
    compared = compare(run, registry.version(3))
    evidence = compared.evidence
    assert compared.champion is not None
    assert evidence is not None
    assert (compared.champion.number, evidence.champion.name, evidence.anchor.name, evidence.looks) == (2, "2", "1", 2)
    assert set(evidence.ever_answered) == {task.name for task in TASKS}
    assert evidence.base.comparison.tasks[NAME].verdict == "better"
    falls = [other.comparison.tasks[NAME].difference for other in (evidence.champion, evidence.anchor)]
    assert falls[1] < falls[0] < 0
    decision = decide(
        summarize(scores(1.1, seed=1, names=(NAME,)), TASKS[:1], model="c", data=run.samples),
        evidence,
        config.promotion.gates,
    )
    assert decision.verdict == "REJECT"
    assert any("worse than version 1, the anchor" in reason for reason in decision.reasons)
    named = Run(config.model_copy(update={"promotion": config.promotion.model_copy(update={"anchor": 2})}))
    assert compare(named, registry.version(3)).evidence.anchor is None  # the champion itself
