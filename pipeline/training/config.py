"""What a training run is told, and the DeepSpeed configuration made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import InputError, did_you_mean


class TrainingConfig(BaseModel):
    """How the adapter is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_workers: int = Field(default=2, ge=1)
    """Data-parallel ranks, one process each."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO partitions optimizer states (1), gradients too (2), parameters too (3); arXiv 1910.02054."""
    global_batch_size: int = Field(default=32, ge=1)
    """Samples an optimizer step, over all ranks."""
    micro_batch_tokens: int = Field(default=2048, ge=1)
    """Tokens a rank puts through the model at once, what prompts begin with in common counted once; the rest of its
    share is accumulated. Memory grows with it."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples a rank puts through the model at once; null: as many as the tokens allow."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward: a third more work, far less memory."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training samples; ``max_steps`` overrides it."""
    max_steps: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    task_learning_rate: float | None = Field(default=None, gt=0)
    """Of what each task has of its own (Λ and w); null: ``learning_rate``."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay, on the matrices A, B and Λ; it moves an absent task's Λ too."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from zero."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """After the warm-up; the two constant ones are the same."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""
    task_weights: dict[str, float] = {}
    """Factor of a task's loss; 1 where it is not named."""
    uncertainty_weighting: bool = False
    """Learn a factor a task too, by the noise that stays in its loss (arXiv 1705.07115)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label's probability that is spread over all classes."""
    checkpoint_steps: int = Field(default=200, ge=1)
    """Optimizer steps between checkpoints; one is written at the end too."""
    keep_checkpoints: int = Field(default=2, ge=1)
    log_steps: int = Field(default=10, ge=1)
    max_failures: int = Field(default=2, ge=0)
    """How often a lost worker is replaced, going on from the last checkpoint."""
    warm_start: Path | None = None
    """Folder of a trained adapter on the same base to begin with: tasks that it lacks start from the mean of its
    tasks, tasks that are gone are left out."""
    only_tasks: tuple[str, ...] = ()
    """Train only what belongs to these tasks alone; everything shared and every other task stays as it is."""
    ledger: bool = False
    """Write ``samples.jsonl``: step, rank, task and key of each sample trained on."""

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

    def check_tasks(self, names: Sequence[str]) -> None:
        """Refuse weights of tasks that are not there, or that are not positive.

        Raises:
            InputError: either.
        """
        for name, weight in self.task_weights.items():
            if name not in names:
                raise InputError(f"training.task_weights must name tasks, got {name!r}{did_you_mean(name, names)}")
            if not weight > 0:
                raise InputError(
                    f"training.task_weights.{name} must be > 0, got {weight}; leave the task out to train without it"
                )

    def num_steps(self, steps_per_epoch: float) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps or max(1, round(self.epochs * steps_per_epoch))


def deepspeed_config(config: TrainingConfig, bfloat16: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration: nothing that matters is left to its defaults."""
    return {
        "train_batch_size": config.global_batch_size,
        # Micro-batches are cut by tokens: the loop says which backward is a step's last one, and divides.
        "train_micro_batch_size_per_gpu": config.rank_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.gradient_clipping,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
