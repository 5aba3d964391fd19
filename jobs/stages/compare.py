"""The challenger against champion, anchor and untrained base on the same samples, in pairs."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.run import Run
from jobs.scoring import Scored, model_of, own_models, score, version_model
from pipeline.contracts import Comparison
from pipeline.evaluation.compare import compare as compare_scores
from pipeline.promotion.evidence import Evidence, Opponent
from pipeline.promotion.versions import Version


@dataclass(frozen=True)
class Compared:
    """What a challenger is held against.

    Args:
        champion: the present one; None where there is none yet.
        evidence: all that the gates need; None where the challenger is champion itself.
    """

    champion: Version | None
    evidence: Evidence | None


def compare(run: Run, version: Version) -> Compared:
    """Score champion and anchor on the run's samples and compare the run with them and with the base, in pairs.

    Args:
        run: of the challenger.
        version: the challenger.
    """
    registry, champion = run.registry, run.registry.champion()
    if champion is not None and champion.number == version.number:
        return Compared(champion, None)
    anchor = registry.anchor([task.name for task in run.config.tasks], run.config.promotion.anchor)
    opponents = [v for v in (champion, anchor) if v is not None]
    models = {v.number: version_model(run, registry, v) for v in opponents}
    ours, base, *theirs = score(run, *own_models(run, run.folder.adapter), *models.values())
    scored = dict(zip(models, theirs, strict=True))

    def held_against(other: Version | None) -> Opponent | None:
        if other is None:
            return None
        name, found = str(other.number), scored[other.number]
        comparison = paired(run, ours, found, str(version.number), name)
        return Opponent(name, found.report, comparison, registry.tasks_of(other))

    untrained = paired(run, ours, base, str(version.number)) if run.config.promotion.gates.beat_base else None
    evidence = Evidence(
        base=Opponent(base.words, base.report, untrained),
        champion=held_against(champion),
        anchor=held_against(anchor) if anchor is not None and anchor != champion else None,
        looks=registry.looks(version.number),
        ever_answered={task for _, origin in registry.versions() for task in origin.tasks},
    )
    return Compared(champion, evidence)


def paired(run: Run, ours: Scored, theirs: Scored, candidate: str = "", reference: str = "") -> Comparison:
    """Compare two models' scores of the same samples, in pairs.

    Args:
        run: whose samples they are.
        ours: the candidate's.
        theirs: the reference's.
        candidate: its name; as it was scored by default.
        reference: likewise.
    """
    return compare_scores(
        ours.scores(),
        theirs.scores(),
        run.config.tasks,
        candidate_name=candidate or ours.words,
        reference_name=reference or theirs.words,
        data=run.samples,
        seed=run.config.seed,
    )


def compare_any(run: Run, candidate: str | None = None, reference: str | None = None) -> Comparison:
    """Compare any two models on the run's test samples.

    Args:
        run: whose test samples are scored.
        candidate: see :data:`jobs.scoring.FORMS`; the run itself by default.
        reference: the same; the champion by default, the untrained base where there is none.

    Raises:
        InputError: the run was not evaluated, or there is no such model.
    """
    if candidate is None:
        run.folder.needs(run.folder.scores("").scores, "evaluate")
    if reference is None:
        champion = run.registry.champion()
        reference = str(champion.number) if champion else "base"
    (ours,) = score(run, model_of(run, candidate or f"run:{run.config.name}"))
    (theirs,) = score(run, model_of(run, reference))
    return paired(run, ours, theirs)
