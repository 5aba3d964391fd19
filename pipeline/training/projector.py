"""The projector of an image-text base, trained on its own before any adapter: vision tower and language model stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.modeling.encoding import SampleEncoder
from pipeline.modeling.packing import micro_batches
from pipeline.modeling.scoring import LabelScorer, label_loss
from pipeline.stream import MixedStream
from pipeline.world import World

_WARMUP_STEPS = 10


def projector_of(model: Any) -> nn.Module:
    """Return the module between a model's vision tower and its language model.

    Raises:
        InputError: the model calls none ``multi_modal_projector``.
    """
    found = getattr(model.base_model, "multi_modal_projector", None)
    if not isinstance(found, nn.Module):
        raise InputError(
            f"a projector is trained of a model with a multi_modal_projector, got {type(model).__name__}; make one "
            "with mtl-lora image-base"
        )
    return found


def train_projector(
    model: Any,
    encoder: SampleEncoder,
    specs: Sequence[TaskSpec],
    stream: MixedStream,
    steps: int,
    learning_rate: float,
    micro_batch_tokens: int,
    told: Callable[[int, float], None],
) -> None:
    """Minimise the loss of the tasks with images by the projector alone, in fp32, whatever the model's type.

    Args:
        model: the frozen base.
        encoder: of its samples.
        specs: the tasks; those of texts alone are left out.
        stream: of their train samples.
        steps: of the optimizer, AdamW with a cosine.
        learning_rate: its peak.
        micro_batch_tokens: most tokens that go through the model at once.
        told: hears of each step and its loss.
    """
    projector, scorer = projector_of(model), LabelScorer(model)
    projector.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=learning_rate, weight_decay=0.0)
    shown = {spec.name for spec in specs if spec.image_field is not None}
    for step, samples in enumerate(stream.batches(World(0, 1), 0, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / _WARMUP_STEPS) * _cosine(step / steps)
        examples = encoder.encode([sample for sample in samples if sample.task in shown])
        total = 0.0
        for part in micro_batches(examples, micro_batch_tokens):
            batch = encoder.collate([examples[i] for i in part]).to(model.device)
            with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
                loss = label_loss(scorer(batch), batch).sum() / len(examples)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        told(step, total)
    projector.to(model.dtype).requires_grad_(False)


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))
