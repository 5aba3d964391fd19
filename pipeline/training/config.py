"""What a training run is told, and the DeepSpeed configuration made of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.contracts import ShardManifest
from pipeline.errors import InputError, did_you_mean
from pipeline.modeling.config import KeptStatesConfig
from pipeline.settings import Settings


class ValidationConfig(Settings):
    """When the macro metric of the validation split is measured, and what follows from it. Answers that are written are
    not written for it: their tasks count by the geometric mean of the right answers' probability a token."""

    every_steps: int = Field(ge=1)
    """Optimizer steps between measurements."""
    split: str = "validation"
    """The split scored; the adapter handed on is the one that was best on it."""
    samples_per_task: int = Field(default=200, ge=1)
    """The first ones of each task."""
    patience: int | None = Field(default=None, ge=1)
    """So many measurements in a row without a better macro metric end the run; null: none does."""

    def check_split(self, manifest: ShardManifest) -> None:
        """Refuse a split in which a task has no sample.

        Raises:
            InputError: one has none.
        """
        missing = [task.name for task in manifest.tasks if not manifest.samples_of(task.name, self.split)]
        if missing:
            raise InputError(
                f"training.validation.split must have samples of every task, {self.split!r} has none of {missing}; "
                f"there are {sorted({shard.split for shard in manifest.shards})}; add TASK/{self.split} files or "
                "name another split"
            )


class TrainingConfig(Settings):
    """How the adapter is trained."""

    num_workers: int = Field(default=2, ge=1)
    """Data-parallel ranks, one process each."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO partitions optimizer states (1), gradients too (2), parameters too (3); arXiv 1910.02054. With 0 and 1 ranks
    meet once a step, with 2 and 3 in every micro-batch; an adapter's gradients are small, so 2 rarely pays."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in the host's memory and step there; needs ZeRO 1 to 3."""
    global_batch_size: int = Field(default=32, ge=1)
    """Samples an optimizer step, over all ranks."""
    micro_batch_tokens: int = Field(default=1024, ge=1)
    """Tokens a rank puts through the model at once, what prompts begin with in common counted once; the rest of its
    share is accumulated. Memory grows with it."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples a rank puts through the model at once; null: as many as the tokens allow."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward: a third more work, far less memory."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training samples; ``max_steps`` overrides it."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, instead of ``epochs``; null: as many as the epochs give."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Largest learning rate, after the warm-up."""
    task_learning_rate: float | None = Field(default=None, gt=0)
    """Of what each task has of its own (Λ, w and its head); null: ``learning_rate``."""
    mixing_learning_rate: float | None = Field(default=None, gt=0)
    """Of the mixing logits w alone; null: that of all that a task has of its own."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Of an encoder's heads, which begin at nothing; null: that of all that a task has of its own."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay, on the matrices that tasks share (A and B); never on what a task owns (Λ and w), which
    would fade while the task is absent."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from zero."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """After the warm-up; the two constant ones are the same."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""
    task_weights: dict[str, float] = Field(default_factory=dict)
    """Factor of a task's loss; 1 where it is not named."""
    uncertainty_weighting: bool = False
    """Learn a factor a task too, by the noise that stays in its loss (arXiv 1705.07115)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label's probability that is spread over all classes; answers that are written have none."""
    orthogonality: float = Field(default=0.0, ge=0)
    """Factor of a term that keeps MTL-LoRA's up-projections apart: the mean over layers of the squared products
    between them. Not with ZeRO 3."""
    kept_states: KeptStatesConfig | None = None
    """Keep on disk the hidden states that enter the first adapted layer, where the adapter leaves layers below it
    frozen: each sample's are then computed once for all epochs, runs and weeks, with the same losses. Where tasks have
    images, the features that the frozen vision tower and its connector make of each one alone, the same whether read or
    computed, and up to rounding those of a batch's images together; null: anew each time."""
    validation: ValidationConfig | None = None
    """Measure on a validation split while training; null: the last adapter is the one handed on."""
    conflict_steps: int | None = Field(default=None, ge=1)
    """Steps between measurements of the cosines between the tasks' gradients, on rank 0's samples; null: none."""
    checkpoint_steps: int = Field(default=200, ge=1)
    """Optimizer steps between checkpoints; one is written at the end too."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest ones that stay, beside the best one."""
    log_steps: int = Field(default=10, ge=1)
    """Steps between two rows of the training log."""
    min_workers: int | None = Field(default=None, ge=1)
    """Fewest ranks to go on with while nodes are missing, and back to ``num_workers``; null: wait for all."""
    resources_per_worker: dict[str, float] = Field(default_factory=dict)
    """What a rank asks of the cluster, by Ray's names: ``CPU`` (1 unless named), ``GPU`` (1 where the cluster has any;
    0 trains on CPUs), ``memory`` in bytes, the cluster's own."""
    accelerator_type: str | None = None
    """Ranks run only on nodes with this accelerator, by Ray's name for it, such as ``H100``; null: on any."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ranks on as few nodes as can be, or on as many; strict: on one node, or each on a node of its own, or not at
    all."""
    max_failures: int = Field(default=2, ge=-1)
    """How often lost workers are replaced, going on from the newest checkpoint; -1: always. A node that Ray
    drains counts too. An error that no restart can fix, such as bad input, ends the run at once."""
    hang_timeout_s: float = Field(default=600.0, gt=0)
    """A rank that ends no step for so long counts as hung and is replaced; loading may take ten minutes, or this where
    it is more."""
    warm_start: Path | None = None
    """Folder of a trained adapter on the same base to begin with: tasks that it lacks start from the mean of its
    tasks, tasks that are gone are left out."""
    only_tasks: tuple[str, ...] = ()
    """Train only what belongs to these tasks alone; everything shared and every other task stays as it is. Needs
    ``warm_start``."""
    ledger: bool = False
    """Write ``samples.jsonl``: step, rank, task and key of each sample trained on."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further keys of DeepSpeed's configuration, such as ``zero_optimization: {overlap_comm: true}``."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "training.offload_optimizer must be false with zero_stage 0, got true; choose zero_stage 1, 2 or 3"
            )
        if self.conflict_steps and self.zero_stage == 3:
            raise ValueError(
                f"training.conflict_steps must be null with zero_stage 3, where no rank has the whole model, "
                f"got {self.conflict_steps}; choose zero_stage 0, 1 or 2"
            )
        if self.orthogonality and self.zero_stage == 3:
            raise ValueError(
                "training.orthogonality must be 0 with zero_stage 3, where no rank has a whole up-projection at hand, "
                f"got {self.orthogonality}; choose zero_stage 0, 1 or 2"
            )
        for name, amount in self.resources_per_worker.items():
            if not amount >= 0 or (name == "GPU" and amount not in (0, 1)):
                raise ValueError(
                    f"training.resources_per_worker.{name} must be "
                    f"{'0 or 1, a rank trains on one device' if name == 'GPU' else '0 or more'}, got {amount:g}; "
                    "change it or leave it out"
                )
        if self.only_tasks and self.warm_start is None:
            raise ValueError(
                "training.only_tasks needs training.warm_start: on a fresh adapter the shared projections are zero and "
                f"stay so, got only_tasks {list(self.only_tasks)}; name a trained adapter to begin with"
            )
        if self.only_tasks and self.conflict_steps:
            raise ValueError(
                f"training.conflict_steps must be null with only_tasks, where nothing that tasks share is trained, "
                f"got {self.conflict_steps}; leave it out"
            )
        return self

    @property
    def rank_batch_size(self) -> int:
        """Samples of a rank in an optimizer step.

        Raises:
            InputError: the ranks do not divide the global batch.
        """
        rows, rest = divmod(self.global_batch_size, self.num_workers)
        if rest:
            raise InputError(
                f"training.global_batch_size must be a multiple of num_workers = {self.num_workers}, "
                f"got {self.global_batch_size}; choose {(rows + 1) * self.num_workers}"
            )
        return rows

    @property
    def every_backward_reduces(self) -> bool:
        """Whether ranks meet in every micro-batch, so that all must have equally many."""
        return self.zero_stage >= 2

    def check_tasks(self, names: Sequence[str]) -> None:
        """Refuse tasks that are not there, and weights that are not positive.

        Raises:
            InputError: either.
        """
        for name in self.only_tasks:
            if name not in names:
                raise InputError(f"training.only_tasks must name tasks, got {name!r}{did_you_mean(name, names)}")
        for name, weight in self.task_weights.items():
            if name not in names:
                raise InputError(f"training.task_weights must name tasks, got {name!r}{did_you_mean(name, names)}")
            if not weight > 0:
                raise InputError(
                    f"training.task_weights.{name} must be > 0, got {weight}; leave the task out to train without it"
                )

    def check_ranks(self) -> None:
        """Check that every number of ranks the run may have divides the batch.

        Raises:
            InputError: one does not, or the least is more than the most.
        """
        least = self.min_workers or self.num_workers
        if least > self.num_workers:
            raise InputError(
                f"training.min_workers must be at most num_workers, {self.num_workers}, got {least}; lower it"
            )
        for ranks in range(least, self.num_workers + 1):
            _ = self.model_copy(update={"num_workers": ranks}).rank_batch_size

    def num_samples(self, epoch_samples: int) -> int:
        """Samples of the whole run. Counted in epochs they end with the epoch, within a last step that is smaller."""
        if self.max_steps is not None:
            return self.max_steps * self.global_batch_size
        return max(1, round(self.epochs * epoch_samples))

    def num_steps(self, epoch_samples: int) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.num_samples(epoch_samples) // self.global_batch_size)


DECIDED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_tokens",
    "gradient_accumulation_steps": "training.micro_batch_tokens",
    "gradient_clipping": "training.gradient_clipping",
    "bf16": "model.dtype",
    "fp16": "model.dtype, bfloat16 or float32",
    "optimizer": "training.learning_rate and training.weight_decay",
    "scheduler": "training.schedule",
    "zero_optimization.stage": "training.zero_stage",
    "zero_optimization.offload_optimizer": "training.offload_optimizer",
    "zero_optimization.cpu_offload": "training.offload_optimizer",
}
"""Keys of DeepSpeed that follow from the run's own, by the key that decides them."""
FURTHER = (
    "communication_data_type",
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "wall_clock_breakdown",
    "zero_optimization",
)
"""Keys that ``training.deepspeed`` may set."""


def check_deepspeed(config: TrainingConfig, known_zero_keys: Collection[str]) -> None:
    """Refuse further DeepSpeed keys that are unknown or contradict the run's own.

    Args:
        config: of the training.
        known_zero_keys: what DeepSpeed knows under ``zero_optimization``.

    Raises:
        InputError: one of them is, with the key that decides it or the nearest known one.
    """
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise InputError(f"training.deepspeed.zero_optimization must be a mapping, got {zero!r}; write key: value")
    for key in (*config.deepspeed, *(f"zero_optimization.{name}" for name in zero)):
        if key in DECIDED:
            raise InputError(f"training.deepspeed must leave {key!r} to {DECIDED[key]}, got it set; set that instead")
    for key in config.deepspeed:
        if key not in FURTHER:
            raise InputError(f"training.deepspeed must hold known keys, got {key!r}{did_you_mean(key, FURTHER)}")
    for key in zero:
        where = f"training.deepspeed.zero_optimization.{key}"
        if key not in known_zero_keys:
            raise InputError(f"{where} must be a key that DeepSpeed knows{did_you_mean(key, known_zero_keys)}")
        if config.zero_stage < 3 and (key == "offload_param" or key.startswith("stage3_")):
            raise InputError(
                f"{where} must be left out with training.zero_stage {config.zero_stage}: "
                "it partitions parameters; choose zero_stage 3"
            )


LIVE_PARAMETERS = 100_000_000
"""Under ZeRO 3, gathered parameters that are kept for their next use, or read before it."""


def deepspeed_config(config: TrainingConfig, bfloat16: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration: nothing that matters is left to its defaults."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage == 3:
        # DeepSpeed's own thousand million would keep 2 GB of weights that have run, in a small model all of it.
        zero |= {"stage3_max_live_parameters": LIVE_PARAMETERS, "stage3_max_reuse_distance": LIVE_PARAMETERS}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": config.global_batch_size,
        # Micro-batches are cut by tokens: the loop says which backward is a step's last one, and divides.
        "train_micro_batch_size_per_gpu": config.rank_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.gradient_clipping,
        "bf16": {"enabled": bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        **config.deepspeed,
        "zero_optimization": zero | config.deepspeed.get("zero_optimization", {}),
    }
