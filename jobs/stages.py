"""The stages up to the export, each idempotent, each handing the next an artefact in the run's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jobs.config import RunConfig
from jobs.run_folder import ADAPTER, EXPORT, PLAN, claim, file_sha256, last_step, merge_ledgers, needs, tracker_of
from pipeline import orchestration
from pipeline.contracts import EvaluationReport, ShardManifest, write_atomic
from pipeline.evaluation import predict, summarize, write_scores
from pipeline.ingestion import prepare as prepare_shards
from pipeline.progress import Track, say
from pipeline.stream import MixedStream, read_split


def check(config: RunConfig) -> None:
    """Refuse what is bound to fail later: base model, label words, batch sizes.

    Raises:
        InputError: any of these breaks its rule.
    """
    from pipeline.modeling.base_model import load_tokenizer, resolve_base
    from pipeline.modeling.encoding import Encoder

    resolve_base(config.model)
    Encoder(load_tokenizer(config.model), config.tasks, config.model.max_length)
    _ = config.training.accumulation_steps


def prepare(config: RunConfig) -> ShardManifest:
    """Write the run's shards, or find them written."""
    check(config)
    config.write()
    manifest = prepare_shards(config.data, config.tasks, config.manifest_path.parent, config.seed)
    counts = {split: sum(manifest.samples_of(t.name, split) for t in manifest.tasks) for split in ("train", "test")}
    rejected = sum(r.records for r in manifest.rejected)
    say(f"{len(manifest.shards)} shards: {counts['train']} train, {counts['test']} test samples, {rejected} rejected")
    return manifest


def plan(config: RunConfig) -> dict[str, Any]:
    """Say what training will do, and write it as ``plan.json``."""
    manifest = prepare(config)
    stream = MixedStream(config.manifest_path, config.seed, config.training.global_batch_size, config.mixture)
    steps = config.training.num_steps(stream.steps_per_epoch)
    numbers = {
        "schema": 1,
        "steps": steps,
        "steps_per_epoch": stream.steps_per_epoch,
        "samples": steps * config.training.global_batch_size,
        "train_samples": {task.name: manifest.samples_of(task.name, "train") for task in manifest.tasks},
        "test_samples": {task.name: manifest.samples_of(task.name, "test") for task in manifest.tasks},
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
    }
    write_atomic(config.folder / PLAN, json.dumps(numbers, indent=2) + "\n")
    return numbers


def train(config: RunConfig) -> Path:
    """Train the adapter on Ray workers, into ``adapter/``; a finished training of the same configuration stands.

    Raises:
        InputError: the run's folder was trained with another configuration.
    """
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec
    from pipeline.training.loop import TrainingJob

    claim(config)
    plan(config)
    adapter = config.folder / ADAPTER
    if (adapter / PREDICTOR_FILE).is_file():
        say(f"{adapter} is trained with this configuration; remove {config.folder} to train anew")
        return adapter
    tracker = tracker_of(config)
    job = TrainingJob(
        manifest_path=config.manifest_path,
        tasks=config.tasks,
        base=config.model,
        adapter=config.adapter,
        training=config.training,
        seed=config.seed,
        mixture=config.mixture,
    )
    try:
        with orchestration.cluster(config.ray):
            checkpoint = orchestration.train(job, config.folder, tracker)
    except BaseException:
        tracker.end("FAILED")
        raise
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
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec, trained_scorer, untrained_scorer

    adapter = config.folder / ADAPTER
    needs(adapter / PREDICTOR_FILE, "train")
    manifest = ShardManifest.read(config.manifest_path)
    spec = PredictorSpec.read(adapter / PREDICTOR_FILE)
    with orchestration.cluster(config.ray):
        base = scored(config, manifest, "base", partial(untrained_scorer, spec))
        trained = scored(config, manifest, "", partial(trained_scorer, adapter))
    metrics = {f"test/{name}/{r.metric}": r.value for name, r in trained.tasks.items()}
    tracker_of(config).log_metrics(metrics | {"test/macro": trained.macro.value}, last_step(config))
    return trained, base


def scored(
    config: RunConfig, manifest: ShardManifest, suffix: str, load: Callable[[int], Any], known: set[str] | None = None
) -> EvaluationReport:
    """Score one model on the test split, unless its scores of the same samples stand already.

    Args:
        config: of the run.
        manifest: of its shards.
        suffix: of the files written; empty for the run's own adapter.
        load: returns the scorer, given its token budget.
        known: names of the tasks that the model knows; None for all.
    """
    end = f"_{suffix}" if suffix else ""
    scores_path, report_path = config.folder / f"scores{end}.parquet", config.folder / f"evaluation{end}.json"
    split = config.evaluation.split
    data = {"manifest_sha256": file_sha256(config.manifest_path), "split": split}
    name = suffix or config.name
    if report_path.is_file() and scores_path.is_file() and report_path.stat().st_mtime > _trained_at(config, suffix):
        standing = EvaluationReport.read(report_path)
        if data.items() <= standing.data.items():
            return standing
    specs = [task for task in config.tasks if known is None or task.name in known]
    samples = [sample for task in specs for sample in read_split(config.manifest_path, split, task=task.name)]
    with (
        orchestration.scoring_pool(
            partial(load, config.evaluation.batch_tokens), config.evaluation.num_workers
        ) as pool,
        Track(f"evaluate {name}", len(samples), "samples") as track,
    ):
        pool.progress = track.advance
        scores = predict(pool, samples, chunk=len(samples))
    write_scores(scores_path, scores)
    summary = summarize(
        scores, specs, model=name, data=data, best_attainable=manifest.best_attainable, seed=config.seed
    )
    summary.write(report_path)
    return summary


def _trained_at(config: RunConfig, suffix: str) -> float:
    if suffix == "champion":
        return float("inf")  # another champion may stand there than last time
    return 0.0 if suffix == "base" else (config.folder / ADAPTER).stat().st_mtime


def export(config: RunConfig) -> list[Path]:
    """Write each task as a plain PEFT LoRA folder, compared by logits with the multi-task model first."""
    from pipeline.modeling.predictor import PREDICTOR_FILE, Predictor

    needs(config.folder / ADAPTER / PREDICTOR_FILE, "train")
    predictor = Predictor.load(config.folder / ADAPTER, "cpu")
    adapted: Any = predictor.scorer.model.adapted
    split = config.evaluation.split
    folders = []
    with Track("export", len(config.tasks), "tasks") as track:
        for task in config.tasks:
            sample = next(iter(read_split(config.manifest_path, split, task=task.name)))
            batch = predictor.scorer.encoder.collate(predictor.scorer.encoder.encode([sample]))
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            folders.append(adapted.export_task(task.name, config.folder / EXPORT / task.name, inputs))
            track.advance()
    return folders
