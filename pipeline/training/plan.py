"""What the planner finds, as values."""

from __future__ import annotations

from pipeline.contracts import Contract


class Calibration(Contract):
    """What a few micro-batches on this machine took, one process with a rank's threads."""

    seconds_per_batch: float
    seconds_per_token: float
    """Forward and backward of a token that is computed."""
    loading_bytes: int
    """Peak memory until the model stands."""
    loaded_bytes: int
    bytes_per_token: float
    """Of activations, at the largest moment of a step."""
    seconds_per_scored_token: float | None = None
    """Forward alone; None where an earlier version measured."""
    loading_seconds: float | None = None
    """Until base and adapter stand in a process that has its imports; None where nothing was measured."""


class TrainingPlan(Contract):
    """The cost of a run. Tokens that prompts share count for each sample, computed ones once."""

    parameters: int
    trained_parameters: int
    tokens: int
    computed_share: float
    """Share of the tokens that is computed; the others stand in a beginning that prompts have in common."""
    micro_batches_per_step: float
    """Of the rank that has most of them."""
    largest_micro_batch_tokens: int
    seconds: float
    """Of all steps, without start-up and validation."""
    validation_seconds: float = 0.0
    """Of all measurements of the validation split."""
    rank_bytes: int
    """Peak memory of a rank: of its process on a CPU, else of its device."""
    checkpoint_bytes: int
    kept_bytes: int
    """All checkpoints that are kept at once."""
    calibration: Calibration | None
    misfits: tuple[str, ...] = ()
    """What the machine lacks, each with its remedy."""
