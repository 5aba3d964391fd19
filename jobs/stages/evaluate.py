"""Trained adapter → its report on the test split, and that of the untrained base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jobs.run import Run
from jobs.run_folder import BASE_EVALUATION, EVALUATION
from jobs.scoring import own_models, score
from pipeline.contracts import EvaluationReport
from pipeline.errors import InputError


@dataclass(frozen=True)
class Evaluation:
    """What the trained adapter and the untrained base scored on the same samples."""

    trained: EvaluationReport
    base: EvaluationReport


def evaluate(run: Run, adapter: Path) -> Evaluation:
    """Score the trained adapter and the untrained base on the test shards; write both reports and the scores.

    Args:
        run: whose samples are scored.
        adapter: folder of its trained adapter.

    Raises:
        InputError: the split holds no samples.
    """
    trained, base = score(run, *own_models(run, adapter))
    metrics = {f"test/{name}/{r.metric}": r.value for name, r in trained.report.tasks.items()}
    run.tracker().log_metrics(metrics | {"test/macro": trained.report.macro.value}, run.last_step())
    return Evaluation(trained.report, base.report)


def standing(run: Run) -> Evaluation:
    """Return the reports that stand.

    Raises:
        InputError: the run was not evaluated, or its shards are not those that were.
    """
    found = Evaluation(run.folder.read(EVALUATION), run.folder.read(BASE_EVALUATION))
    if found.trained.data["manifest_sha256"] != run.samples["manifest_sha256"]:
        raise InputError(
            f"the shards must be those that were evaluated, {run.config.manifest_path} are others; "
            "run first: mtl-lora evaluate with this --config"
        )
    return found
