"""The evidence → PROMOTE, HOLD or REJECT, written down before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jobs.run import Run
from jobs.run_folder import DECISION
from jobs.stages.compare import Opponent
from jobs.stages.evaluate import Evaluation
from pipeline.contracts import PromotionDecision
from pipeline.errors import HeldBack
from pipeline.evaluation.parity import export_parity
from pipeline.evaluation.predict import evenly_spaced
from pipeline.progress import say
from pipeline.promotion.policy import decide as decide_by_gates
from pipeline.promotion.registry import Version
from pipeline.stream import read_split

_PARITY_SAMPLES = 8
"""Holdout samples of each task on which its export is compared with the adapter."""


def decide(
    run: Run, version: Version, opponent: Opponent | None, evaluation: Evaluation, exports: Mapping[str, Path]
) -> PromotionDecision:
    """Decide on the challenger by the gates; before it may pass, each exported task must answer as the adapter does.

    Args:
        run: of the challenger.
        version: the challenger.
        opponent: the champion, None where there is none yet.
        evaluation: what the challenger and the untrained base scored.
        exports: task → its exported folder.
    """
    if opponent is not None and opponent.version.number == version.number:
        return _standing(run, version)
    decision = decide_by_gates(
        evaluation.trained,
        evaluation.base,
        opponent.report if opponent else None,
        run.config.promotion.gates,
        against_champion=opponent.comparison if opponent else None,
    ).model_copy(
        update={
            "candidate": str(version.number),
            "champion": str(opponent.version.number) if opponent else None,
        }
    )
    if decision.verdict == "PROMOTE" and (deposed := run.registry.deposed(version.number)) is not None:
        words = (
            f"version {version.number} was champion until {deposed.who} made version {deposed.version} champion at "
            f"{deposed.time:%Y-%m-%d %H:%M} UTC; to bring it back: mtl-lora rollback --to {version.number}"
        )
        decision = decision.model_copy(update={"verdict": "HOLD", "reasons": (words,)})
    if decision.verdict == "PROMOTE":
        decision = _held_to_exports(run, exports, decision)
    run.folder.write(DECISION, decision)
    return decision


def _standing(run: Run, version: Version) -> PromotionDecision:
    """Return the decision by which the version became champion."""
    words = f"version {version.number} of {run.registry.name} is champion already"
    say(words)
    found = run.folder.find(DECISION)
    if found is None:  # the folder was removed, and the same training came to the same weights
        number = str(version.number)
        found = PromotionDecision(verdict="PROMOTE", reasons=(words,), candidate=number, champion=number, tasks={})
        run.folder.write(DECISION, found)
    return found


def _held_to_exports(run: Run, exports: Mapping[str, Path], decision: PromotionDecision) -> PromotionDecision:
    config = run.config
    samples = evenly_spaced(
        list(read_split(config.manifest_path, config.evaluation.split, cache=config.cache)), _PARITY_SAMPLES
    )
    try:
        apart = max(export_parity(run.folder.adapter, exports, samples).values())
    except HeldBack as refusal:
        return decision.model_copy(update={"verdict": "REJECT", "reasons": (str(refusal),)})
    words = (
        f"exports answer as the adapter does, {apart:.1g} apart at most in log-probability on {len(samples)} samples"
    )
    return decision.model_copy(update={"reasons": (*decision.reasons, words)})
