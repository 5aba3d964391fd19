"""What a training run will take, said before any worker starts: time, memory, disk, and whether the machine has them.

Lengths and micro-batches are those of real steps, cut as a rank will cut them. Speed and memory come from a short
calibration of the real model on real samples, or else from counts of parameters and activations.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.contracts import TaskSpec
from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.answering import sample_encoder
from pipeline.modeling.architecture import is_encoder
from pipeline.modeling.base_model import BaseModelConfig, empty_base, resolve_base, resolve_dtype
from pipeline.modeling.packing import Example, HeadExample, micro_batches, pack
from pipeline.storage import is_remote
from pipeline.stream import CacheConfig, LossDriven, MixedStream
from pipeline.training.config import TrainingConfig
from pipeline.training.counts import count_model
from pipeline.training.loop import TrainingJob, job_stream
from pipeline.training.memory import BYTES_A_QUANTIZED, Counts, MemoryPlan, plan_memory, rank_memory
from pipeline.training.plan import Calibration, TrainingPlan
from pipeline.world import World

SAMPLED_STEPS = 16
_PROCESS_BYTES = 800 << 20
"""Of a rank's process with torch, DeepSpeed and Ray imported."""
_CPU_FLOPS, _GPU_FLOPS = 40e9, 50e12
"""Of one rank, cautiously, where nothing was measured."""


class _Shape(NamedTuple):
    """The sampled steps: for each the computed tokens of each rank's micro-batches."""

    steps: list[list[list[int]]]
    tokens: int
    computed: int
    most_answers: int


def plan_training(job: TrainingJob, calibration: Calibration | None, run_folder: Path, is_local: bool) -> TrainingPlan:
    """Return what a run will take.

    Args:
        job: the run.
        calibration: from :func:`pipeline.orchestration.calibration.calibrate`; None estimates from counts.
        run_folder: where checkpoints will stand.
        is_local: whether the ranks will run on this machine, which is then asked for what it has.
    """
    training = job.training
    stream = job_stream(job)
    num_steps = training.num_steps(stream.epoch_samples)
    shape = _shape(job, stream, num_steps)
    base = empty_base(job.base)
    counts = count_model(base, job.adapter, job.tasks)
    parameters, trained = counts.linear + counts.plain, counts.trained
    known = calibration or _assumed(job.base, counts, base)
    largest = max(max(parts) for ranks in shape.steps for parts in ranks)
    seconds = sum(
        max(sum(known.seconds_per_batch + known.seconds_per_token * n for n in parts) for parts in ranks)
        for ranks in shape.steps
    )
    checkpoint = trained * 12 + trained * _bytes(job.base) + (64 << 10)
    kept = checkpoint * (training.keep_checkpoints + 1 + (training.validation is not None))
    plan = TrainingPlan(
        parameters=parameters,
        trained_parameters=trained,
        tokens=round(shape.tokens * num_steps / len(shape.steps)),
        computed_share=shape.computed / shape.tokens,
        micro_batches_per_step=sum(max(map(len, ranks)) for ranks in shape.steps) / len(shape.steps),
        largest_micro_batch_tokens=largest,
        seconds=seconds * num_steps / len(shape.steps),
        validation_seconds=_validation_seconds(job, known, num_steps),
        rank_bytes=_rank_bytes(job, known, counts, largest),
        checkpoint_bytes=checkpoint,
        kept_bytes=kept,
        calibration=calibration,
    )
    return (
        plan.model_copy(update={"misfits": tuple(_misfits(job, plan, run_folder, stream.working_set_bytes))})
        if is_local
        else plan
    )


def plan_layouts(
    base: BaseModelConfig, adapter: AdapterConfig, tasks: Sequence[TaskSpec], training: TrainingConfig
) -> MemoryPlan:
    """Return what a model takes under every layout on any number of ranks; nothing of it but ``config.json`` is read.

    Args:
        base: names the model; a local folder may hold its ``config.json`` alone.
        adapter: its shape.
        tasks: that share it.
        training: says the tokens of a micro-batch, and whether activations are computed again.

    Raises:
        InputError: there is no configuration to read, or the adapter does not fit the model.
    """
    counts = count_model(empty_base(base, layout_only=True), adapter, tasks)
    return plan_memory(counts, _bytes(base), training.micro_batch_tokens, training.activation_checkpointing)


def sampled_examples(
    job: TrainingJob, stream: MixedStream, steps: Sequence[int], rank: int = 0
) -> list[list[Example | HeadExample]]:
    """Return a rank's tokenised samples of some steps."""
    encoder = sample_encoder(job.base, job.tasks)
    world = World(rank, job.training.num_workers)
    return [list(encoder.encode(stream.samples(step, world))) for step in steps]


def sampled_steps(stream: MixedStream, num_steps: int, count: int = SAMPLED_STEPS) -> list[int]:
    """Return steps from all over a run, or those that are known under a mixture that follows the losses."""
    if isinstance(stream.mixture, LossDriven):
        num_steps = min(num_steps, stream.mixture.every_steps)
    count = min(count, num_steps)
    return [(2 * i + 1) * num_steps // (2 * count) for i in range(count)]


def _shape(job: TrainingJob, stream: MixedStream, num_steps: int) -> _Shape:
    training, steps = job.training, sampled_steps(stream, num_steps)
    tokens = computed = most_answers = 0
    by_rank = [sampled_examples(job, stream, steps, rank) for rank in range(training.num_workers)]
    sampled = []
    for place in range(len(steps)):
        ranks = []
        for rank in by_rank:
            examples = rank[place]
            parts = micro_batches(examples, training.micro_batch_tokens, training.micro_batch_size)
            packed = [pack([examples[i] for i in part]) for part in parts]
            ranks.append([len(batch.input_ids) for batch in packed])
            tokens += sum(batch.num_tokens for batch in packed)
            most_answers = max(most_answers, *(len(batch.answer) for batch in packed))
        computed += sum(map(sum, ranks))
        sampled.append(ranks)
    return _Shape(sampled, tokens, computed, most_answers)


def _validation_seconds(job: TrainingJob, known: Calibration, num_steps: int) -> float:
    """Return what all measurements of the validation split take, which the ranks share."""
    asked = job.training.validation
    if asked is None:
        return 0.0
    from pipeline.training.validation import validation_samples  # loads scipy, which other plans do without

    samples = validation_samples(asked, job.manifest_path, job.tasks, job.cache)
    examples = list(sample_encoder(job.base, job.tasks).encode(samples))
    parts = micro_batches(examples, job.training.micro_batch_tokens)
    tokens = sum(len(pack([examples[i] for i in part]).input_ids) for part in parts)
    # Where it was not measured, the backward is taken to cost as much as the forward.
    per_token = known.seconds_per_scored_token or known.seconds_per_token / 2
    measurements = -(-num_steps // asked.every_steps)
    return measurements * tokens * per_token / job.training.num_workers


def _bytes(config: BaseModelConfig) -> int:
    return 2 if resolve_dtype(config.dtype) is torch.bfloat16 else 4


def _assumed(config: BaseModelConfig, counts: Counts, base: torch.nn.Module) -> Calibration:
    """Return a cautious guess from counts alone."""
    width, parameters = _bytes(config), counts.linear + counts.plain
    on_gpu = torch.cuda.is_available()
    process = 0 if on_gpu else _PROCESS_BYTES
    weights = round(counts.plain * width + counts.linear * BYTES_A_QUANTIZED.get(config.quantization or "", width))
    # An encoder multiplies nothing by its embeddings, a language model does in its head.
    looked_up = base.get_input_embeddings().weight.numel() if is_encoder(base.config) else 0  # type: ignore[operator]
    files = sum(path.stat().st_size for path in resolve_base(config).glob("*.safetensors"))
    return Calibration(
        seconds_per_batch=0.0,
        seconds_per_token=4 * (parameters - looked_up) / (_GPU_FLOPS if on_gpu else _CPU_FLOPS),
        loading_bytes=process + weights + files,
        loaded_bytes=process + weights,
        bytes_per_token=counts.token * width,
    )


def _rank_bytes(job: TrainingJob, known: Calibration, counts: Counts, largest: int) -> int:
    training, width = job.training, _bytes(job.base)
    found = rank_memory(
        counts,
        num_ranks=training.num_workers,
        zero_stage=training.zero_stage,
        width=width,
        offload_optimizer=training.offload_optimizer,
        quantization=job.base.quantization,
    )
    # A process holds on the host what it offloads, too.
    more = found.gradients + found.optimizer + found.gathered
    more += 0 if torch.cuda.is_available() else found.host
    per_token = known.bytes_per_token * (0.2 if training.activation_checkpointing else 1.0)
    # Of the base, what other ranks hold; with a quantised one every rank has all of it.
    elsewhere = 0 if job.base.quantization else (counts.linear + counts.plain) * width - found.weights
    # Under ZeRO 3 the base is split while it is read: no rank ever holds the whole.
    loading = known.loading_bytes - elsewhere
    return max(loading, known.loaded_bytes - elsewhere + more + math.ceil(per_token * largest))


def _misfits(job: TrainingJob, plan: TrainingPlan, run_folder: Path, working_set_bytes: int) -> list[str]:
    workers, on_gpu = job.training.num_workers, torch.cuda.is_available()
    have = torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0))
    what = "GPUs" if on_gpu else "CPUs"
    found = []
    if workers > have:
        found.append(f"training.num_workers must be at most the machine's {what}, {have}, got {workers}; lower it")
    memory = torch.cuda.mem_get_info()[0] if on_gpu else available_bytes()
    need = plan.rank_bytes * (1 if on_gpu else workers)
    if need > memory:
        found.append(
            f"the ranks need {_gibibytes(need)} of memory, the {'GPU' if on_gpu else 'machine'} has "
            f"{_gibibytes(memory)} free; lower training.micro_batch_tokens (now {job.training.micro_batch_tokens}) or "
            "num_workers, or set training.activation_checkpointing"
        )
    folder, free = _free_bytes(run_folder)
    if plan.kept_bytes > free:
        found.append(
            f"the checkpoints need {_gibibytes(plan.kept_bytes)} of disk, {folder} has {_gibibytes(free)} free; "
            "lower training.keep_checkpoints or choose another run_root"
        )
    if is_remote(job.manifest_path):
        cache = job.cache or CacheConfig()
        folder, free = _free_bytes(cache.path().absolute())
        if (need := min(working_set_bytes, cache.max_bytes)) > free and cache.range_reads != "always":
            found.append(
                f"the shards read at a time need {_gibibytes(need)} of cache, {folder} has {_gibibytes(free)} free; "
                "free some, name another cache.folder, or set cache.range_reads=always"
            )
    return found


def _free_bytes(place: Path) -> tuple[Path, int]:
    """Return the nearest folder that is there, and what is free on its disk."""
    folder = next(path for path in (place, *place.parents) if path.exists())
    return folder, shutil.disk_usage(folder).free


def available_bytes() -> int:
    """Return the memory that processes can still take: of the machine, or of the container where that is less."""
    with Path("/proc/meminfo").open() as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def calibration_job(job: TrainingJob) -> TrainingJob:
    """Return the job of one rank alone, as the calibration runs it."""
    return replace(job, training=job.training.model_copy(update={"num_workers": 1}))
