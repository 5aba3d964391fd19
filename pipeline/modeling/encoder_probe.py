"""Proof, when an encoder is loaded, that the states it is scored by are its own; it decides how rows are laid out.

A few rows, one of them of the longest length, go through the model alone, without padding, as anyone calls it, and
as the scorer lays them out. Either both agree or rows are padded, and where these differ too the base is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.modeling import packed_attention
from pipeline.modeling.answer_rows import AnswerRows, find_attention
from pipeline.modeling.architecture import short
from pipeline.modeling.config import BaseModelConfig
from pipeline.modeling.head_scoring import RowReading, row_states
from pipeline.modeling.packing import Batch, HeadExample, pack
from pipeline.modeling.probe import embedding_size

_LENGTHS = (6, 3)


@torch.no_grad()
def choose_encoder_rows(model: Any, config: BaseModelConfig) -> str | None:
    """Let an encoder take packed rows where its states stay its own, else padded ones; sets its ``row_reading``.

    Args:
        model: a Hugging Face encoder in evaluation mode.
        config: names it; ``packed_rows``, ``pooling`` and ``max_length`` count.

    Returns:
        Why its rows are padded although packed ones were asked for; None where they are not.

    Raises:
        InputError: it does not read plain text of ``max_length`` tokens, or its states differ even with padded rows.
    """
    has_segments = (getattr(model.config, "type_vocab_size", None) or 0) > 1
    model.row_reading = RowReading(config.pooling, has_segments)
    examples = [_example(model, length, has_segments) for length in (*_LENGTHS, config.max_length)]
    batch = pack(examples).to(model.device)
    try:
        own_PH = torch.cat([_own_state(model, example) for example in examples])
    except Exception as error:  # each architecture that cannot fails in its own way
        raise InputError(
            f"model.base must read rows of model.max_length = {config.max_length} tokens, {config.base!r} "
            f"({model.config.model_type}) does not: {short(error)}; lower model.max_length, or take another model"
        ) from error
    if objection := _objection(model, batch, own_PH):
        raise InputError(
            f"model.base must give padded rows the states that it gives each alone, {config.base!r} "
            f"({model.config.model_type}) does not: {objection}; take another model"
        )
    return _take_packed_rows(model, batch, own_PH) or None if config.packed_rows else None


def _example(model: Any, length: int, has_segments: bool) -> HeadExample:
    size = embedding_size(model)
    row = tuple(size // 3 + (7 * i + length) % (size // 2) for i in range(length))
    types = tuple(int(has_segments and i >= length // 2) for i in range(length))
    return HeadExample(f"probe/{length}", 0, (row,), (types,), (0,), (1.0,))


def _own_state(model: Any, example: HeadExample) -> Tensor:
    """Return the pooled state (1, H) of a row that the model reads alone."""
    ids = torch.tensor(example.rows, device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.row_reading.has_segments:
        inputs["token_type_ids"] = torch.tensor(example.token_types, device=model.device)
    states: Tensor = model(**inputs).last_hidden_state
    if states.shape[:2] != ids.shape:
        raise ValueError(f"states must be one a token, got {tuple(states.shape)} for {ids.shape[1]} tokens")
    return states[:, 0] if model.row_reading.pooling == "first" else states.float().mean(1)


def _objection(model: Any, batch: Batch, own_PH: Tensor) -> str:
    """Return why the scorer's states are not the model's own; empty if they are."""
    try:
        found_PH = row_states(model, batch, nullcontext())
    except Exception as error:  # noqa: BLE001 - see choose_encoder_rows
        return short(error)
    eps, own = torch.finfo(model.dtype).eps, own_PH.float()
    apart = (found_PH.float() - own).abs().max()
    allowed = max(1e-4, 8 * eps) * (own.max() - own.min()) + 8 * eps * own.abs().max()
    return "" if bool(apart <= allowed) else f"states differ by up to {apart:.2g}"


def _take_packed_rows(model: Any, batch: Batch, own_PH: Tensor) -> str:
    """Exchange the model's attention where it can be; return why it cannot, empty where it can."""
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be exchanged"
    before, reading = model.config._attn_implementation, model.row_reading
    model.set_attn_implementation(packed_attention.NAME)
    reasons = ["its attention cannot be exchanged"]
    if model.config._attn_implementation == packed_attention.NAME:
        reasons = []
        for first in _first_positions(model):
            model.row_reading = replace(reading, first_position=first)
            if not (reason := _objection(model, batch, own_PH)):
                _take_answer_rows(model, batch, own_PH)
                return ""
            reasons.append(reason)
    model.set_attn_implementation(before)
    model.row_reading = reading
    return reasons[0]


def _take_answer_rows(model: Any, batch: Batch, own_PH: Tensor) -> None:
    """Let the last layer give the answers' states alone where they stay the model's own."""
    reading: RowReading = model.row_reading
    found = find_attention(model, lambda: row_states(model, batch, nullcontext()))
    if found is None:
        return
    narrowed, model.row_reading = AnswerRows(*found), replace(reading, ends_with_answers=True)
    if _objection(model, batch, own_PH):
        narrowed.remove()
        model.row_reading = reading


def _first_positions(model: Any) -> Sequence[int]:
    """Return the positions that a row's first token may have: RoBERTa and its like begin behind the padding's."""
    padding = getattr(model.config, "pad_token_id", None)
    return (0,) if padding is None else (0, padding + 1)
