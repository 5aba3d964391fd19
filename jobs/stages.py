"""The stages up to the export, each idempotent, each handing the next an artefact in the run's folder."""

from __future__ import annotations

import json
import math
import os
import shutil
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.config import RunConfig
from jobs.preparation import check_drift, prepared
from jobs.run_folder import ADAPTER, EXPORT, PLAN, check_claim, claim, last_step, needs, tracker_of
from pipeline import orchestration
from pipeline.contracts import EvaluationReport, ShardManifest, write_atomic
from pipeline.errors import InputError
from pipeline.evaluation import predict, summarize, write_scores
from pipeline.evaluation.features import write_features
from pipeline.evaluation.predict import spread
from pipeline.ingestion import publish
from pipeline.modeling.adapter import METHODS_WITH_TASK_PARTS
from pipeline.progress import Track, say
from pipeline.stream import load_manifest, manifest_sha256, merge_ledgers, plan_stream, read_split
from pipeline.tracking import send_history
from pipeline.training.config import check_deepspeed

if TYPE_CHECKING:
    from pipeline.training.loop import TrainingJob


def check(config: RunConfig) -> None:
    """Refuse what is bound to fail later: base model, label words, batch sizes.

    Raises:
        InputError: any of these breaks its rule.
    """
    from pipeline.modeling.adapter import check_shape
    from pipeline.modeling.base_model import load_tokenizer, resolve_base
    from pipeline.modeling.encoding import Encoder

    resolve_base(config.model)
    Encoder(load_tokenizer(config.model), config.tasks, config.model.max_length)
    config.training.check_ranks()
    config.training.check_tasks([task.name for task in config.tasks])
    if config.training.only_tasks and config.adapter.method not in METHODS_WITH_TASK_PARTS:
        raise InputError(
            f"training.only_tasks needs an adapter with parts of each task, {' or '.join(METHODS_WITH_TASK_PARTS)}, "
            f"got adapter.method {config.adapter.method!r}; train all tasks"
        )
    if config.training.warm_start is not None:
        check_shape(config.adapter, config.training.warm_start)
    if config.training.deepspeed:
        from pipeline.training.engine import zero_keys

        check_deepspeed(config.training, zero_keys())


def prepare(config: RunConfig, append: bool = False) -> ShardManifest:
    """Write the run's shards, or find them written; check their drift; publish them where that is asked for.

    Args:
        config: of the run.
        append: add what ``data`` names to the shards that are there, as a further partition.

    Raises:
        HeldBack: the data has drifted too far from the earlier one.
        InputError: the folder is another configuration's.
    """
    if not append:
        check_claim(config)
    check(config)
    config.write()
    manifest = prepared(config, append)
    check_drift(config)
    if config.publish:
        say(f"published as {publish(config.shards, config.publish, config.cache.patience_s)}")
    counts = {split: sum(manifest.samples_of(t.name, split) for t in manifest.tasks) for split in ("train", "test")}
    rejected = sum(r.records for r in manifest.rejected)
    say(f"{len(manifest.shards)} shards: {counts['train']} train, {counts['test']} test samples, {rejected} rejected")
    return manifest


def plan(config: RunConfig, calibrate: bool = False) -> dict[str, Any]:
    """Say what training will do and take, and write it as ``plan.json``.

    Args:
        config: of the run.
        calibrate: measure speed and memory on a few micro-batches instead of estimating them.
    """
    from pipeline.training.calibration import calibrate as measure
    from pipeline.training.planner import calibration_job, plan_training

    manifest = prepare(config)
    training = config.training
    if training.validation is not None:
        training.validation.check_split(manifest)
    epoch = plan_stream(
        config.manifest_path,
        config.seed,
        training.global_batch_size,
        config.mixture,
        length_grouping=config.length_grouping,
        num_ranks=training.num_workers,
        cache=config.cache,
        micro_batch_size=training.micro_batch_size,
    )
    steps = training.num_steps(epoch.samples)
    numbers = {
        "schema": 1,
        "steps": steps,
        "samples": training.num_samples(epoch.samples),
        "test_samples": {task.name: manifest.samples_of(task.name, "test") for task in manifest.tasks},
        "packed_rows": config.model.packed_rows,
        "tokens": {
            name: round(task.mean_length * task.given_share * training.num_samples(epoch.samples))
            for name, task in epoch.tasks.items()
        },
        "epoch": epoch.model_dump(mode="json"),
    }
    job, is_local = _job(config), (config.ray.address or os.environ.get("RAY_ADDRESS", "")) in ("", "local")
    found = plan_training(job, measure(calibration_job(job)) if calibrate else None, config.folder, is_local)
    numbers["training"] = found.model_dump(mode="json")
    write_atomic(config.folder / PLAN, json.dumps(numbers, indent=2) + "\n")
    return numbers


def _job(config: RunConfig) -> TrainingJob:
    from pipeline.training.loop import TrainingJob

    return TrainingJob(
        manifest_path=config.manifest_path,
        tasks=config.tasks,
        base=config.model,
        adapter=config.adapter,
        training=config.training,
        seed=config.seed,
        mixture=config.mixture,
        length_grouping=config.length_grouping,
        cache=config.cache,
    )


def train(config: RunConfig) -> Path:
    """Train the adapter on Ray workers, into ``adapter/``; a finished training of the same configuration stands.

    Raises:
        InputError: the run's folder was trained with another configuration, or holds another adapter's checkpoints.
    """
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec
    from pipeline.training.checkpoint import Checkpoints
    from pipeline.training.host import CHECKPOINTS, HISTORY

    claim(config)
    for misfit in plan(config)["training"]["misfits"]:
        say(f"WARNING: {misfit}")
    adapter = config.folder / ADAPTER
    if (adapter / PREDICTOR_FILE).is_file():
        say(f"{adapter} is trained with this configuration; remove {config.folder} to train anew")
        return adapter
    job = _job(config)
    checkpoints = Checkpoints(config.folder / CHECKPOINTS, job.adapter_sha256)
    checkpoints.refuse_foreign()
    tracker = tracker_of(config)
    try:
        with orchestration.cluster(config.ray):
            checkpoint = orchestration.train(job, config.folder, tracker)
        if config.training.validation is not None:
            checkpoint = checkpoints.best() or checkpoint
    except BaseException as error:
        tracker.end_if_reachable("KILLED" if isinstance(error, SystemExit) else "FAILED")
        raise
    send_history(tracker, config.folder / HISTORY)
    if config.training.ledger:
        merge_ledgers(config.folder)
    staged = config.folder / f".{ADAPTER}"
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(checkpoint / ADAPTER, staged)
    PredictorSpec(tasks=config.tasks, base=config.model).write(staged / PREDICTOR_FILE)
    shutil.rmtree(adapter, ignore_errors=True)
    staged.rename(adapter)
    return adapter


def evaluate(config: RunConfig) -> tuple[EvaluationReport, EvaluationReport]:
    """Score the trained adapter and the untrained base on the test shards; write both reports and the scores."""
    from pipeline.modeling.predictor import PREDICTOR_FILE

    adapter = config.folder / ADAPTER
    needs(adapter / PREDICTOR_FILE, "train")
    trained, base = standing_report(config, ""), standing_report(config, "base")
    if trained is None or base is None:
        with orchestration.cluster(config.ray), scoring_pool(config, adapter) as pool:
            base = base or scored(config, pool, "base", "base")
            trained = trained or scored(config, pool, "trained", "")
    metrics = {f"test/{name}/{r.metric}": r.value for name, r in trained.tasks.items()}
    tracker_of(config).log_metrics(metrics | {"test/macro": trained.macro.value}, last_step(config))
    return trained, base


def scoring_pool(config: RunConfig, predictor: Path) -> AbstractContextManager[orchestration.ScoringPool]:
    """Return the workers that score with a predictor's folder, trained or untrained."""
    from pipeline.modeling.predictor import load_scorers

    load = partial(load_scorers, predictor, config.evaluation.batch_tokens)
    return orchestration.scoring_pool(load, config.evaluation.num_workers)


def scored(
    config: RunConfig, pool: orchestration.ScoringPool, model: str, suffix: str, known: set[str] | None = None
) -> EvaluationReport:
    """Score one model on the test split; write its scores and its report.

    Args:
        config: of the run.
        pool: the workers.
        model: the scorer to ask, ``trained`` or ``base``.
        suffix: of the files written; empty for the run's own adapter.
        known: names of the tasks that the model knows; None for all.
    """
    manifest, _, _ = load_manifest(config.manifest_path)
    specs = [task for task in config.tasks if known is None or task.name in known]
    split = config.evaluation.split
    read = partial(read_split, config.manifest_path, split, cache=config.cache)
    samples = [sample for task in specs if manifest.samples_of(task.name, split) for sample in read(task=task.name)]
    if not samples:
        raise InputError(
            f"split {split!r} must have a sample of {[task.name for task in specs]}, it has none; bring some"
        )
    name = suffix or config.name
    shown = spread(samples, _FEATURES_PER_TASK)
    with Track(f"evaluate {name}", len(samples), "samples") as track:
        pool.model, pool.progress = model, track.advance
        pool.wanted, pool.states = frozenset((sample.task, sample.key) for sample in shown), {}
        scores = predict(pool, samples, chunk=len(samples))
    timed = spread(samples, math.ceil(_LATENCY_ROWS / len(specs))) if _times(config, suffix) else []
    scores_path, report_path, features_path = evaluation_paths(config, suffix)
    write_scores(scores_path, scores)
    write_features(features_path, pool.states)
    summary = summarize(
        scores,
        specs,
        model=name,
        data=_scored_data(config),
        best_attainable=manifest.best_attainable,
        seed=config.seed,
    )
    summary = summary.model_copy(update={"latency_ms": pool.latency_ms(timed) if timed else None})
    summary.write(report_path)
    return summary


_FEATURES_PER_TASK = 60
"""Samples of each task whose hidden states are kept for the report's planes."""
_LATENCY_ROWS = 32
"""Rows over all tasks that are answered one at a time where a gate limits the latency."""


def _times(config: RunConfig, suffix: str) -> bool:
    return config.promotion.gates.max_latency_ms is not None and suffix != "base"


def evaluation_paths(config: RunConfig, suffix: str) -> tuple[Path, Path, Path]:
    """Return the files of one model's evaluation: scores, report, features; ``suffix`` as for :func:`scored`."""
    end, folder = f"_{suffix}" if suffix else "", config.folder
    return folder / f"scores{end}.parquet", folder / f"evaluation{end}.json", folder / f"features{end}.safetensors"


def _scored_data(config: RunConfig) -> dict[str, str]:
    return {"manifest_sha256": manifest_sha256(config.manifest_path), "split": config.evaluation.split}


def standing_report(config: RunConfig, suffix: str, adapter: Path | None = None) -> EvaluationReport | None:
    """Return the report that stands already, if it is of the same samples and no older than the adapter.

    Args:
        config: of the run.
        suffix: of its files, as for :func:`scored`.
        adapter: folder of the model that was scored; the run's own where the suffix is empty.
    """
    scores_path, report_path, _ = evaluation_paths(config, suffix)
    adapter = config.folder / ADAPTER if suffix == "" else adapter
    if not (report_path.is_file() and scores_path.is_file()):
        return None
    if adapter is not None and report_path.stat().st_mtime < adapter.stat().st_mtime:
        return None
    found = EvaluationReport.read(report_path)
    if _times(config, suffix) and found.latency_ms is None:
        return None
    return found if _scored_data(config).items() <= found.data.items() else None


def export(config: RunConfig) -> list[Path]:
    """Write each task as a plain PEFT LoRA folder, compared by logits with the multi-task model first."""
    from pipeline.modeling.predictor import PREDICTOR_FILE, Predictor

    needs(config.folder / ADAPTER / PREDICTOR_FILE, "train")
    predictor = Predictor.load(config.folder / ADAPTER, "cpu")
    adapted: Any = predictor.scorer.model.adapted
    split, manifest = config.evaluation.split, load_manifest(config.manifest_path)[0]
    folders = []
    with Track("export", len(config.tasks), "tasks") as track:
        for task in config.tasks:
            shown = split if manifest.samples_of(task.name, split) else "train"
            sample = next(iter(read_split(config.manifest_path, shown, task=task.name, cache=config.cache)))
            batch = predictor.scorer.encoder.collate(predictor.scorer.encoder.encode([sample]))
            input_ids, attention_mask, *_ = batch.padded()
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            folders.append(adapted.export_task(task.name, config.folder / EXPORT / task.name, inputs))
            track.advance()
    return folders
