"""The evidence → PROMOTE, HOLD or REJECT, written down before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.live_evidence import live_comparison
from jobs.run import Run
from jobs.run_folder import DECISION
from jobs.stages.compare import Compared
from jobs.stages.evaluate import Evaluation
from pipeline.contracts import PromotionDecision, Sample
from pipeline.errors import HeldBack
from pipeline.evaluation.parity import export_parity
from pipeline.evaluation.predict import evenly_spaced
from pipeline.mirror import SharedFolder, here
from pipeline.orchestration.environment import address_of, inside_job
from pipeline.orchestration.mapping import mapper
from pipeline.progress import say
from pipeline.promotion import policy
from pipeline.promotion.live import live_finding
from pipeline.promotion.registry import Version
from pipeline.stream import read_split

_PARITY_SAMPLES = 8
"""Holdout samples of each task on which its export is compared with the adapter."""


def decide(
    run: Run, version: Version, compared: Compared, evaluation: Evaluation, exports: Mapping[str, Path]
) -> PromotionDecision:
    """Decide on the challenger by the gates; before it may pass, each exported task must answer as the adapter does.

    Args:
        run: of the challenger.
        version: the challenger.
        compared: what the challenger is held against.
        evaluation: what it scored.
        exports: task → its exported folder.
    """
    if compared.evidence is None:
        return _standing(run, version)
    decision = policy.decide(evaluation.trained, compared.evidence, run.config.promotion.gates)
    decision = decision.model_copy(update={"candidate": str(version.number)})
    decision = policy.after(decision, policy.not_deposed(version.number, run.registry.deposed(version.number)))
    if run.config.promotion.live is not None and compared.champion is not None and decision.verdict == "PROMOTE":
        finding = live_finding(
            live_comparison(run, version, compared.champion),
            [task.name for task in run.config.tasks],
            run.config.promotion.live,
        )
        decision = policy.after(decision, finding)
    if decision.verdict == "PROMOTE":
        decision = policy.after(decision, _parity(run, exports))
    run.folder.write(DECISION, decision)
    return decision


def _standing(run: Run, version: Version) -> PromotionDecision:
    """Return the decision by which the version became champion."""
    already = policy.champion_already(run.registry.name, version.number)
    say(already.reasons[0])
    found = run.folder.find(DECISION)
    if found is None:  # the folder was removed, and the same training came to the same weights
        run.folder.write(DECISION, already)
    return found or already


def _parity(run: Run, exports: Mapping[str, Path]) -> policy.Finding:
    config = run.config
    samples = evenly_spaced(
        list(read_split(config.manifest_path, config.evaluation.split, cache=config.cache)), _PARITY_SAMPLES
    )
    try:
        # Both sides load the base: on a cluster that is a worker's to do, not the head's.
        is_afar = inside_job() or address_of(config.ray.address)
        over = mapper(config.ray, alone_s=0) if is_afar else map
        folders = {task: run.shared(folder) for task, folder in exports.items()}
        (apart,) = over(_largest_difference, [(run.shared(run.folder.adapter), folders, samples)])
    except HeldBack as refusal:
        return policy.exports_agree(None, len(samples), str(refusal))
    return policy.exports_agree(apart, len(samples))


def _largest_difference(
    compared: tuple[Path | SharedFolder, Mapping[str, Path | SharedFolder], Sequence[Sample]],
) -> float:
    adapter, exports, samples = compared
    return max(export_parity(here(adapter), {task: here(each) for task, each in exports.items()}, samples).values())
