"""Proof, when a base model is loaded, that label scores will be the model's own; it decides how rows are laid out.

On a few tokens the model is asked twice: plainly, one row at a time without padding, and as the scorer asks. Whatever
an architecture does in its head, its masks or its layers, either both agree or the base is refused, or its rows are
padded. Axes as in :mod:`pipeline.modeling.scoring`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.modeling import packed_attention
from pipeline.modeling.architecture import short
from pipeline.modeling.config import BaseModelConfig
from pipeline.modeling.packing import Batch, Example, pack
from pipeline.modeling.scoring import LabelScorer

_ROW = 6
"""Tokens of the rows that are tried."""


@torch.no_grad()
def choose_rows(model: Any, config: BaseModelConfig) -> str | None:
    """Let a model take packed rows where its scores stay its own, else padded ones.

    Args:
        model: a Hugging Face causal language model in evaluation mode.
        config: names it; ``packed_rows`` and ``max_length`` count.

    Returns:
        Why its rows are padded although packed ones were asked for; None where they are not.

    Raises:
        InputError: it does not answer plain text, is not causal, or its scores differ even with padded rows.
    """
    batch = _batch(model).to(model.device)
    try:
        own_PV = own_logits(model, batch)
        is_causal = _is_causal(model)
    except Exception as error:  # noqa: BLE001 - each architecture that cannot fails in its own way
        raise InputError(
            f"model.base must answer plain text, {config.base!r} ({model.config.model_type}) does not: {short(error)}; "
            "take a causal language model of text"
        ) from error
    if not is_causal:
        raise InputError(
            f"model.base must be a causal language model, in {config.base!r} ({model.config.model_type}) later tokens "
            "change what earlier ones say, as in an encoder; take a decoder such as a Llama, Qwen or GPT model"
        )
    if objection := _objection(model, batch, own_PV):
        raise InputError(
            f"model.base must score label words as its own forward does, {config.base!r} ({model.config.model_type}) "
            f"does not: {objection}; take another model"
        )
    return _take_packed_rows(model, batch, own_PV, config.max_length) if config.packed_rows else None


def own_logits(model: Any, batch: Batch) -> Tensor:
    """Return the model's own logits at the answer positions, (P, V) in fp32: one row at a time, without padding."""
    input_ids, mask, _, answer = batch.padded()
    logits: Tensor | None = None
    for row, (ids, is_token) in enumerate(zip(input_ids, mask.bool(), strict=True)):
        found = _forward(model, ids[is_token])
        if logits is None:
            logits = found.new_full((*input_ids.shape, found.shape[-1]), float("nan"))
        logits[row, : len(found)] = found
    if logits is None:
        raise ValueError("a batch must have a row, got none")
    return logits.flatten(0, 1)[answer]


def _forward(model: Any, ids: Tensor) -> Tensor:
    row = ids[None]
    logits: Tensor = model(input_ids=row, attention_mask=torch.ones_like(row)).logits  # as anyone calls it
    if logits.shape[:2] != row.shape:
        raise ValueError(f"logits must be one row a token, got {tuple(logits.shape)} for {row.shape[1]} tokens")
    return logits[0].float()


def _tokens(model: Any, number: int) -> list[int]:
    """Return different tokens from the middle of the vocabulary, where none are special."""
    size = model.get_input_embeddings().weight.shape[0]
    return [(size // 3 + 7 * i) % size for i in range(number)]


def _batch(model: Any) -> Batch:
    """Return two rows of one beginning and different lengths, one of them answered by words of one and two tokens."""
    t = _tokens(model, 2 * _ROW)
    return pack(
        [
            Example("probe/long", 0, tuple(t[:_ROW]), ((t[6],), (t[7],)), (1.0, 0.0), False),
            Example("probe/short", 0, (*t[:2], t[8]), ((t[9], t[10]), (t[11],)), (1.0, 0.0), False),
        ]
    )


def _is_causal(model: Any) -> bool:
    t = torch.tensor(_tokens(model, 2 * _ROW), device=model.device)
    half = _ROW // 2
    one, other = (_forward(model, ids)[:half] for ids in (t[:_ROW], torch.cat([t[:half], t[_ROW : _ROW + half]])))
    return _agree(model, one, other)


def _agree(model: Any, one: Tensor, other: Tensor) -> bool:
    """Whether two sets of logits (..., V) give the same log-probabilities but for rounding."""
    eps = torch.finfo(model.dtype).eps
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    apart = torch.where(p == q, 0.0, (p - q).abs())  # some heads give tokens that do not exist -inf
    finite = p[p.isfinite()]
    if not len(finite):
        return False
    spread, largest = finite.max() - finite.min(), one[one.isfinite()].abs().max()
    return bool(apart.max() <= max(1e-4, 8 * eps) * spread + 8 * eps * largest)


def _objection(model: Any, batch: Batch, own_PV: Tensor) -> str:
    """Return why the scorer's logits, as the model's attention stands, are not the model's own; empty if they are."""
    try:
        found_PV, _ = LabelScorer(model).answer_logits(batch)
        if found_PV.shape != own_PV.shape:
            return f"its head gives {tuple(found_PV.shape)} for {tuple(own_PV.shape)}"
    except Exception as error:  # noqa: BLE001 - see choose_rows
        return short(error)
    return "" if _agree(model, own_PV, found_PV) else f"logits differ by up to {(own_PV - found_PV).abs().max():.2g}"


def _take_packed_rows(model: Any, batch: Batch, own_PV: Tensor, longest: int) -> str | None:
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be exchanged"
    config = model.config
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    before = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    before[""] = config._attn_implementation
    model.set_attn_implementation(packed_attention.NAME)
    reason = "its attention cannot be exchanged"
    if config._attn_implementation == packed_attention.NAME:
        try:
            reason = _packed_objection(model, batch, own_PV, longest)
        except Exception as error:  # noqa: BLE001 - a probe that fails says that the model cannot
            reason = short(error)
    if not reason:
        return None
    model.set_attn_implementation(before)
    return reason


def _packed_objection(model: Any, batch: Batch, own_PV: Tensor, longest: int) -> str:
    if not _rows_stay_apart(model, longest):
        return "tokens meet outside of attention"
    with packed_attention.recorded_masks(longest) as record:
        plain_PV = own_logits(model, batch)
    if not _agree(model, own_PV, plain_PV):
        return "its attention is not the usual one"
    return record.verdict() or _objection(model, batch, own_PV)


def _rows_stay_apart(model: Any, longest: int) -> bool:
    """Whether another first row leaves the second one's logits as they are.

    Attention may be the only layer in which tokens meet: a convolution or a state-space layer would carry one row's
    text into the next.
    """
    tokens = torch.tensor(_tokens(model, 2 * _ROW), device=model.device)
    position = torch.arange(_ROW, device=model.device).repeat(2)
    owner = torch.arange(2 * _ROW, device=model.device)
    one, other = (
        model(
            **packed_attention.packed_inputs(ids, position, (owner.view(2, _ROW),), owner, longest), use_cache=False
        ).logits[0, _ROW:]
        for ids in (tokens, torch.cat([tokens[:_ROW].flip(0), tokens[_ROW:]]))
    )
    rounding = 8 * torch.finfo(model.dtype).eps  # experts that get other tokens may round otherwise
    return bool((one - other).abs().max() <= rounding * one.abs().max())
