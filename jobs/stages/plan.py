"""What training will do and take, said before a worker starts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from jobs.config import RunConfig
from jobs.run import Run
from pipeline.contracts import Contract, ShardManifest
from pipeline.modeling.size_plan import AdapterSizes
from pipeline.stream import StreamPlan, plan_stream
from pipeline.training.plan import TrainingPlan

if TYPE_CHECKING:
    from pipeline.training.loop import TrainingJob
    from pipeline.training.memory import MemoryPlan


class RunPlan(Contract):
    """``plan.json``: the steps, samples and cost of a run."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    steps: int
    samples: int
    test_samples: dict[str, int]
    packed_rows: bool
    tokens: dict[str, int]
    """Task → tokens of its prompts over the whole run."""
    epoch: StreamPlan
    adapter: AdapterSizes | None = None
    """The counts of all methods, where ``adapter.size`` asks for one."""
    training: TrainingPlan


def plan(run: Run, manifest: ShardManifest, calibrate: bool = False, in_process: bool = False) -> RunPlan:
    """Say what training will do and take, and write it.

    Args:
        run: that is planned.
        manifest: of its data.
        calibrate: measure speed and memory on a few micro-batches instead of estimating them.
        in_process: measure in this process, which trains the run itself.

    Raises:
        InputError: the validation split has no samples, or whatever the stream refuses.
    """
    from pipeline.modeling.adapter import adapter_as_trained
    from pipeline.orchestration.calibration import calibrate as measure
    from pipeline.training.planner import calibration_job, plan_training

    config, training = run.config, run.config.training
    sizes = adapter_as_trained(config.adapter, config.model, len(config.tasks), training.warm_start)[1]
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
    samples = training.num_samples(epoch.samples)
    job, is_local = training_job(config), (config.ray.address or os.environ.get("RAY_ADDRESS", "")) in ("", "local")
    measured = measure(calibration_job(job), in_process) if calibrate else None
    found = RunPlan(
        steps=training.num_steps(epoch.samples),
        samples=samples,
        test_samples={task.name: manifest.samples_of(task.name, "test") for task in manifest.tasks},
        packed_rows=config.model.packed_rows,
        tokens={name: round(task.mean_length * task.given_share * samples) for name, task in epoch.tasks.items()},
        epoch=epoch,
        adapter=sizes,
        training=plan_training(job, measured, run.folder.path, is_local),
    )
    found.write(run.folder.plan)
    return found


def memory(config: RunConfig) -> MemoryPlan:
    """Say what a rank holds under every ZeRO stage, offloaded and quantised, on 1 to 512 ranks.

    Nothing is prepared or loaded: of the model its ``config.json`` counts, of the tasks their number.

    Raises:
        InputError: the model's configuration cannot be read, or the adapter does not fit it.
    """
    from pipeline.training.planner import plan_layouts

    return plan_layouts(config.model, config.adapter, config.tasks, config.training)


def training_job(config: RunConfig) -> TrainingJob:
    """Return what the workers are told; the adapter's rank is solved.

    Raises:
        InputError: as :func:`pipeline.modeling.adapter.adapter_as_trained`.
    """
    from pipeline.modeling.adapter import adapter_as_trained
    from pipeline.training.loop import TrainingJob

    tasks, warm_start = config.tasks, config.training.warm_start
    return TrainingJob(
        manifest_path=config.manifest_path,
        tasks=tasks,
        base=config.model,
        adapter=adapter_as_trained(config.adapter, config.model, len(tasks), warm_start)[0],
        training=config.training,
        seed=config.seed,
        mixture=config.mixture,
        length_grouping=config.length_grouping,
        cache=config.cache,
    )
