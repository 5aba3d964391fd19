"""The decision → the registry: the one stage that changes who answers traffic."""

from __future__ import annotations

from jobs.run import Run
from pipeline.contracts import PromotionDecision
from pipeline.orchestration.environment import is_on_lasting_cluster
from pipeline.promotion.registry import Version


def promote(run: Run, version: Version, decision: PromotionDecision) -> PromotionDecision:
    """Make the version champion where the decision says so.

    Args:
        run: of the version.
        version: to promote.
        decision: on it.

    Raises:
        HeldBack: another champion has come since this one was compared.
    """
    run.tracker().set_tags({"verdict": decision.verdict, "model_version": str(version.number)})
    champion = run.registry.champion()
    if decision.verdict == "PROMOTE" and (champion is None or champion.number != version.number):
        run.registry.promote(version.number, decision, run.may_go_on)
    if is_on_lasting_cluster(run.config.ray.address):
        from pipeline.orchestration.metrics import tell_of_model  # imports Ray

        since = run.registry.champion_since()
        tell_of_model(run.config.ray, run.registry.name, verdict=decision.verdict, champion_since=since)
    return decision
