"""The plan against the shards it was made of, and what it says where a run does not fit."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from pipeline.ingestion import DataConfig, prepare
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.answering import sample_encoder
from pipeline.modeling.base_model import BaseModelConfig, empty_base, load_base
from pipeline.orchestration.calibration import calibrate
from pipeline.stream import CacheConfig, read_split
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from pipeline.training import planner
from pipeline.training.config import TrainingConfig, ValidationConfig
from pipeline.training.loop import TrainingJob, job_stream
from pipeline.training.plan import Calibration
from pipeline.training.planner import plan_training, sampled_examples

MEASURED = Calibration(
    seconds_per_batch=0.5, seconds_per_token=0.01, loading_bytes=5, loaded_bytes=10 << 20, bytes_per_token=1000.0
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    folder = tmp_path_factory.mktemp("shards")
    prepare(DataConfig(synthetic=SyntheticAdsConfig(rows_per_day=12, days=4)), synthetic_ads_tasks(), folder, seed=0)
    return TrainingJob(
        manifest_path=folder / "manifest.json",
        tasks=tuple(synthetic_ads_tasks()),
        base=BaseModelConfig(num_layers=2, dtype="float32"),
        adapter=AdapterConfig(r=4),
        training=TrainingConfig(num_workers=1, global_batch_size=8, max_steps=6, micro_batch_tokens=150),
        seed=3,
    )


def test_an_empty_base_counts_as_the_loaded_one(job: TrainingJob) -> None:
    counts = []
    for base in (empty_base(job.base), load_base(job.base)):
        adapted = build_adapter(job.adapter, base, [task.name for task in job.tasks])
        counts.append(
            [sum(p.numel() for p in adapted.parameters() if p.requires_grad is is_on) for is_on in (False, True)]
        )
    assert counts[0] == counts[1]
    assert counts[0][1] > 0


def test_tokens_and_time_are_those_of_the_steps_themselves(job: TrainingJob, tmp_path: Path) -> None:
    plan = plan_training(job, MEASURED, tmp_path, is_local=True)
    steps = sampled_examples(job, job_stream(job), range(6))
    tokens = sum(example.num_tokens for examples in steps for example in examples)
    assert plan.tokens == tokens
    batches = plan.micro_batches_per_step * 6
    assert plan.seconds == pytest.approx(0.5 * batches + 0.01 * plan.computed_share * tokens)
    assert plan.rank_bytes > MEASURED.loaded_bytes + 1000 * plan.largest_micro_batch_tokens
    assert plan.misfits == ()


def test_two_ranks_take_the_time_of_the_slower_one(job: TrainingJob, tmp_path: Path) -> None:
    two = replace(job, training=job.training.model_copy(update={"num_workers": 2}))
    alone = plan_training(job, MEASURED, tmp_path, is_local=True)
    both = plan_training(two, MEASURED, tmp_path, is_local=True)
    assert alone.seconds / 2 < both.seconds < alone.seconds
    assert both.tokens == alone.tokens


def test_what_the_machine_lacks_is_named_with_the_remedy(job: TrainingJob, tmp_path: Path) -> None:
    many = replace(job, training=job.training.model_copy(update={"num_workers": 8}))
    greedy = MEASURED.model_copy(update={"loaded_bytes": 1 << 50})
    misfits = plan_training(many, greedy, tmp_path, is_local=True).misfits
    assert any("memory" in misfit and "lower training.micro_batch_tokens (now 150)" in misfit for misfit in misfits)
    assert plan_training(many, greedy, tmp_path, is_local=False).misfits == ()


def test_shards_that_do_not_fit_the_cache_are_a_misfit(job: TrainingJob, tmp_path: Path) -> None:
    plan = plan_training(job, MEASURED, tmp_path, is_local=True)
    cache = CacheConfig(folder=str(tmp_path / "cache"), max_bytes=1 << 60)
    remote = replace(job, manifest_path="s3://shards/ads", cache=cache)
    assert planner._misfits(remote, plan, tmp_path, 1 << 20) == planner._misfits(job, plan, tmp_path, 1 << 58) == []
    found = planner._misfits(remote, plan, tmp_path, 1 << 58)
    assert len(found) == 1
    assert "name another cache.folder" in found[0]
    ranges = replace(remote, cache=cache.model_copy(update={"range_reads": "always"}))
    assert planner._misfits(ranges, plan, tmp_path, 1 << 58) == []


def test_parameters_that_are_partitioned_are_not_held(job: TrainingJob, tmp_path: Path) -> None:
    big = MEASURED.model_copy(update={"loaded_bytes": 1 << 30})

    def rank_bytes(stage: int) -> int:
        training = job.training.model_copy(update={"num_workers": 2, "zero_stage": stage})
        return plan_training(replace(job, training=training), big, tmp_path, is_local=False).rank_bytes

    base = sum(p.numel() for p in empty_base(job.base).parameters()) * 4
    gathered = 2 * 4 * max(p.numel() for p in empty_base(job.base).parameters())  # a module is whole while it runs
    assert rank_bytes(2) - rank_bytes(3) + gathered == pytest.approx(base / 2, rel=0.01)
    assert rank_bytes(0) > rank_bytes(1) > rank_bytes(2)


def test_measurements_of_the_validation_split_are_counted_by_their_tokens(job: TrainingJob, tmp_path: Path) -> None:
    validation = ValidationConfig(every_steps=4, split="test", samples_per_task=3)  # after steps 4 and 6
    measured = MEASURED.model_copy(update={"seconds_per_scored_token": 0.004})
    asked = replace(job, training=job.training.model_copy(update={"validation": validation}))
    plan = plan_training(asked, measured, tmp_path, is_local=False)
    samples = [s for task in job.tasks for s in islice(read_split(job.manifest_path, "test", task.name), 3)]
    tokens = sum(example.num_tokens for example in sample_encoder(job.base, job.tasks).encode(samples))
    assert 0 < plan.validation_seconds <= 2 * 0.004 * tokens
    assert plan.validation_seconds >= 2 * 0.004 * tokens * 0.5  # beginnings in common are computed once
    assert plan.seconds == plan_training(job, measured, tmp_path, is_local=False).seconds
    assert plan_training(job, measured, tmp_path, is_local=False).validation_seconds == 0


@pytest.mark.slow
def test_calibration_runs_the_model(job: TrainingJob) -> None:
    found = calibrate(job)
    assert found.seconds_per_scored_token is not None
    assert 0 < found.seconds_per_scored_token < 2 * found.seconds_per_token
    assert found.loading_seconds is not None
    assert found.loading_seconds > 0
    weights = sum(p.numel() for p in empty_base(job.base).parameters()) * 4
    assert found.loading_bytes >= found.loaded_bytes > weights
    assert found.seconds_per_token > 0
    assert found.bytes_per_token > 2 * 576 * 4
