"""How a model is scored."""

from __future__ import annotations

from pydantic import Field

from pipeline.settings import Settings


class EvaluationConfig(Settings):
    """Scoring of the test shards."""

    num_workers: int = Field(default=2, ge=1)
    """Scoring processes."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """Of each, a share of one where it is less than 1: small models share a device; null: one where the cluster has as
    many as scoring processes, else none."""
    split_base: bool = False
    """The base is split over the scoring processes, as under ``training.zero_stage: 3``: none holds more than its part
    and a layer. They read every sample together, so more of them need less memory, not less time."""
    batch_tokens: int = Field(default=2048, ge=64)
    """Most tokens, padding and written answers included, that go through the model at once."""
    split: str = "test"
    """Split that is scored, and on which models are compared."""
    lora_run: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """A run of LoRA on the same data, evaluated: the report shows its task features beside this run's (the paper's
    figure 1). Null: the untrained base's."""
