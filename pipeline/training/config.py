"""What a training run is told, and the DeepSpeed configuration made of it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import InputError


class TrainingConfig(BaseModel):
    """How the adapter is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_workers: int = Field(default=2, ge=1)
    """Data-parallel ranks, one process each."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO partitions optimizer states (1), gradients too (2), parameters too (3); arXiv 1910.02054."""
    global_batch_size: int = Field(default=32, ge=1)
    """Samples an optimizer step, over all ranks."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Samples a rank puts through the model at once; the rest of its share is accumulated."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training samples; ``max_steps`` overrides it."""
    max_steps: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay, on the matrices A, B and Λ; it moves an absent task's Λ too."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from zero."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""
    checkpoint_steps: int = Field(default=200, ge=1)
    """Optimizer steps between checkpoints; one is written at the end too."""
    keep_checkpoints: int = Field(default=2, ge=1)
    log_steps: int = Field(default=10, ge=1)
    max_failures: int = Field(default=2, ge=0)
    """How often a lost worker is replaced, going on from the last checkpoint."""
    ledger: bool = False
    """Write ``samples.jsonl``: step, rank, task and key of each sample trained on."""

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches a rank accumulates before a step.

        Raises:
            InputError: ranks and micro-batches do not divide the global batch.
        """
        rows = self.num_workers * self.micro_batch_size
        if self.global_batch_size % rows:
            raise InputError(
                f"training.global_batch_size must be a multiple of num_workers × micro_batch_size = "
                f"{self.num_workers} × {self.micro_batch_size}, got {self.global_batch_size}; "
                f"choose {max(rows, self.global_batch_size // rows * rows)}"
            )
        return self.global_batch_size // rows

    def num_steps(self, steps_per_epoch: float) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps or max(1, round(self.epochs * steps_per_epoch))


def deepspeed_config(config: TrainingConfig, bfloat16: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration: nothing that matters is left to its defaults."""
    return {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": config.gradient_clipping,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
