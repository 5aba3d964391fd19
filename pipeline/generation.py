"""How a task's answers are written: the part of its specification that says so."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pipeline.settings import Settings

TEXT_METRICS = frozenset({"exact_match", "token_f1", "rouge_l", "bleu", "chrf", "cider"})
"""Metrics of written answers, all from 0 to 1."""
WRITTEN_LABEL_METRICS = frozenset({"accuracy", "macro_f1", "f1", "matthews"})
"""Metrics of labels that are written: those that need no probabilities."""


class GenerationConfig(Settings):
    """How a task's answers are written, and how writing them is trained."""

    max_new_tokens: int = Field(default=32, ge=1)
    """Longest answer in tokens, its end token included; a prompt has ``model.max_length`` less this. In training a
    longer answer loses its end."""
    num_beams: int = Field(default=1, ge=1)
    """Beams of the search; 1 takes the likeliest token at every step (greedy)."""
    length_penalty: float = Field(default=1.0, allow_inf_nan=False)
    """With beams: power of the length by which a beam's log-likelihood is divided; above 0 favours longer answers."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer beside the model's own end token; they and what follows are no part of it."""
    loss: Literal["sample", "token"] = "sample"
    """What weighs alike in the loss: every ``sample`` (the mean over its answer's tokens), or every ``token`` of the
    task's answers in a step, so that long answers weigh more; the task as a whole weighs as many samples either way."""

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if not all(stop):
            raise ValueError(f"generation.stop must list texts of at least one character, got {list(stop)}")
        return stop
