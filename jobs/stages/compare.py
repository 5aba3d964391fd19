"""Challenger and champion on the same samples, in pairs."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.run import Run
from jobs.scoring import Scored, model_of, own_models, score, version_model
from pipeline.contracts import Comparison, EvaluationReport
from pipeline.evaluation.compare import compare as compare_scores
from pipeline.promotion.registry import Version


@dataclass(frozen=True)
class Opponent:
    """The champion that a challenger is held against.

    Args:
        version: it is.
        report: what it scored on the run's samples; None where the challenger is champion itself.
        comparison: the paired differences, challenger less champion; None likewise.
    """

    version: Version
    report: EvaluationReport | None = None
    comparison: Comparison | None = None


def compare(run: Run, version: Version) -> Opponent | None:
    """Score the champion on the run's samples and compare the run with it, in pairs.

    Args:
        run: of the challenger.
        version: the challenger.

    Returns:
        None where there is no champion yet.
    """
    champion = run.registry.champion()
    if champion is None:
        return None
    if champion.number == version.number:
        return Opponent(champion)
    ours, theirs = score(run, own_models(run, run.folder.adapter)[0], version_model(run, run.registry, champion))
    return Opponent(champion, theirs.report, paired(run, ours, theirs, str(version.number), str(champion.number)))


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
