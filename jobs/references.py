"""Any model by its reference, scored on a run's test samples: base, run, registered version, exported task."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from jobs.config import RunConfig
from jobs.run_folder import ADAPTER
from jobs.stages import evaluation_paths, scored, standing_report
from pipeline import orchestration
from pipeline.errors import InputError, did_you_mean
from pipeline.evaluation import read_scores
from pipeline.promotion.registry import Registry
from pipeline.stream import load_manifest

FORMS = "base, run:NAME, models:/NAME@ALIAS, models:/NAME/NUMBER, an alias or number of the run's own model, or a "
FORMS += "folder export/TASK"


def scores_of(config: RunConfig, reference: str) -> tuple[str, pd.DataFrame]:
    """Return a model's name in words and its scores of the run's test samples, scoring them where need be.

    Args:
        config: of the run whose shards are scored.
        reference: one of :data:`FORMS`.

    Raises:
        InputError: there is no such model, or the run has no shards.
    """
    load_manifest(config.manifest_path)
    if reference == "base":
        return "untrained base", _scores(config, "base", partial(load_untrained, config), "base")
    if reference.startswith("run:"):
        return f"run {reference[4:]}", _run(config, reference[4:])
    for folder in (Path(reference), config.folder / reference):
        if (folder / "adapter_config.json").is_file():
            return f"export {folder.name}", _export(config, folder.resolve())
    return _version(config, reference)


def _run(config: RunConfig, name: str) -> pd.DataFrame:
    from pipeline.modeling.predictor import PREDICTOR_FILE

    adapter = config.run_root / name / ADAPTER
    if not (adapter / PREDICTOR_FILE).is_file():
        known = [path.parent.parent.name for path in config.run_root.glob(f"*/{ADAPTER}/{PREDICTOR_FILE}")]
        raise InputError(
            f"run:NAME must be a trained run in {config.run_root}, got {name!r}{did_you_mean(name, known)}"
        )
    suffix = "" if name == config.name else f"run-{name}"
    return _adapter_scores(config, suffix, adapter, adapter)


def _version(config: RunConfig, reference: str) -> tuple[str, pd.DataFrame]:
    found = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if found is None and not re.fullmatch(r"[A-Za-z0-9_-]+", reference):
        raise InputError(f"a model must be named as {FORMS}, got {reference!r}")
    model, wanted = (found[1], found[2] or found[3]) if found else (config.promotion.model_name, reference)
    registry = Registry(model, config.tracking.uri)
    number = registry.version(wanted).number
    suffix = f"{model}-{number}"
    folder = config.folder / f".{suffix}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        return f"version {number} of {model}", _adapter_scores(config, suffix, registry.download(number, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _adapter_scores(config: RunConfig, suffix: str, adapter: Path, made: Path | None = None) -> pd.DataFrame:
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec, load_scorers

    known = {task.name for task in PredictorSpec.read(adapter / PREDICTOR_FILE).tasks}
    load = partial(load_scorers, adapter, config.evaluation.batch_tokens)
    return _scores(config, suffix, load, "trained", known, made)


def _export(config: RunConfig, folder: Path) -> pd.DataFrame:
    names = [task.name for task in config.tasks]
    if folder.name not in names:
        raise InputError(
            f"an exported folder must bear the name of a task, got {folder.name!r}{did_you_mean(folder.name, names)}"
        )
    place = f"export-{folder.parent.parent.name}-{folder.name}"
    return _scores(config, place, partial(_load_export, config, folder), "trained", {folder.name}, folder)


def _scores(
    config: RunConfig,
    suffix: str,
    load: Callable[[], dict[str, Any]],
    model: str,
    known: set[str] | None = None,
    made: Path | None = None,
) -> pd.DataFrame:
    if standing_report(config, suffix, made) is None:
        pool = orchestration.scoring_pool(load, config.evaluation.num_workers)
        with orchestration.cluster(config.ray), pool as workers:
            scored(config, workers, model, suffix, known)
    return read_scores(evaluation_paths(config, suffix)[0])


def load_untrained(config: RunConfig) -> dict[str, Any]:
    """Return a scorer, ``base``, of the base model without any adapter."""
    from pipeline.modeling.base_model import load_base, load_tokenizer
    from pipeline.modeling.encoding import Encoder
    from pipeline.modeling.predictor import default_device
    from pipeline.modeling.scoring import LabelScorer, Scorer

    encoder = Encoder(load_tokenizer(config.model), config.tasks, config.model.max_length)
    base = LabelScorer(load_base(config.model, default_device()))
    return {"base": Scorer(base, encoder, config.evaluation.batch_tokens)}


def _load_export(config: RunConfig, folder: Path) -> dict[str, Any]:
    from pipeline.evaluation.parity import exported_scorer
    from pipeline.modeling.predictor import PredictorSpec

    task = next(task for task in config.tasks if task.name == folder.name)
    spec = PredictorSpec(tasks=(task,), base=config.model)
    return {"trained": exported_scorer(folder, spec, config.evaluation.batch_tokens)}
