"""Proof, when a base model is loaded, that label scores will be the model's own; it decides how rows are laid out.

The model is asked a few tokens twice: plainly, one row at a time without padding, and as the scorer asks. Whatever
an architecture does in its head, its masks or its layers, either both agree or the base is refused, or its rows are
padded. Axes as in :mod:`pipeline.modeling.scoring`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.errors import InputError
from pipeline.modeling import packed_attention
from pipeline.modeling.architecture import short, text_settings
from pipeline.modeling.config import BaseModelConfig
from pipeline.modeling.packing import Batch, Example, pack
from pipeline.modeling.scoring import LabelScorer, answer_logits

_ROW, _SHARED = 6, 2
"""Tokens of the longer row that is tried, and those with which the other one begins too."""


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
        rows = [_forward(model, ids[is_token]) for ids, is_token in _rows(batch)]
    except Exception as error:  # each architecture that cannot fails in its own way
        raise InputError(
            f"model.base must answer plain text, {config.base!r} ({model.config.model_type}) does not: {short(error)}; "
            "take a causal language model of text"
        ) from error
    if not agree(model, *(row[:_SHARED] for row in rows)):
        raise InputError(
            f"model.base must be a causal language model, in {config.base!r} ({model.config.model_type}) later tokens "
            "change what earlier ones say, as in an encoder; take a decoder such as a Llama, Qwen or GPT model"
        )
    own_PV = _at_answers(rows, batch)
    if objection := _objection(model, batch, own_PV):
        raise InputError(
            f"model.base must score label words as its own forward does, {config.base!r} ({model.config.model_type}) "
            f"does not: {objection}; take another model"
        )
    reason = "" if config.packed_rows else None
    if config.packed_rows and not (reason := _take_packed_rows(model, batch, own_PV, config.max_length)):
        return None
    try:
        _longest_row(model, config.max_length)
    except Exception as error:  # see above
        raise InputError(
            f"model.base must read prompts of model.max_length = {config.max_length} tokens, {config.base!r} "
            f"({model.config.model_type}) does not: {short(error)}; lower model.max_length"
        ) from error
    return reason


def _rows(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens of each row and which of them are no padding."""
    input_ids, mask, _, _ = batch.padded()
    return zip(input_ids, mask.bool(), strict=True)


def _at_answers(rows: Sequence[Tensor], batch: Batch) -> Tensor:
    """Return the logits (P, V) at the answer positions of rows' logits, each (tokens, V)."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=float("nan"))
    return padded.flatten(0, 1)[batch.padded()[3]]


def _forward(model: Any, ids: Tensor) -> Tensor:
    row = ids[None]
    logits: Tensor = model(input_ids=row, attention_mask=torch.ones_like(row)).logits  # as anyone calls it
    if logits.shape[:2] != row.shape:
        raise ValueError(f"logits must be one row a token, got {tuple(logits.shape)} for {row.shape[1]} tokens")
    return logits[0].float()


def embedding_size(model: Any) -> int:
    """Return how many tokens a model has vectors of, also where the weight is split over processes."""
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _tokens(model: Any, number: int) -> list[int]:
    """Return different tokens from the middle of the vocabulary, where none are special."""
    size = embedding_size(model)
    return [size // 3 + (7 * i) % (size // 2) for i in range(number)]


def _batch(model: Any) -> Batch:
    """Return two rows of one beginning and different lengths, one of them answered by words of one and two tokens."""
    t = _tokens(model, 2 * _ROW)
    return pack(
        [
            Example("probe/long", 0, tuple(t[:_ROW]), ((t[6],), (t[7],)), (1.0, 0.0), False),
            Example("probe/short", 0, (*t[:_SHARED], t[8]), ((t[9], t[10]), (t[11],)), (1.0, 0.0), False),
        ]
    )


def agree(model: Any, one: Tensor, other: Tensor) -> bool:
    """Return whether two sets of logits (..., V) give the same log-probabilities but for rounding."""
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
    return "" if agree(model, own_PV, found_PV) else f"logits differ by up to {(own_PV - found_PV).abs().max():.2g}"


def _take_packed_rows(model: Any, batch: Batch, own_PV: Tensor, longest: int) -> str:
    """Exchange the model's attention where it can be; return why it cannot, empty where it can."""
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be exchanged"
    config = model.config
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    before = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    before[""] = config._attn_implementation
    # Images are looked at as ever: only what reads text attends in rows.
    of_text = [name for name, part in parts.items() if part is text_settings(config)]
    model.set_attn_implementation({of_text[0]: packed_attention.NAME} if of_text else packed_attention.NAME)
    reason = "its attention cannot be exchanged"
    if packed_attention.is_packed(model):
        try:
            reason = _packed_objection(model, batch, own_PV, longest)
        except Exception as error:  # noqa: BLE001 - a probe that fails says that the model cannot
            reason = short(error)
    if reason:
        model.set_attn_implementation(before)
    return reason


def _packed_objection(model: Any, batch: Batch, own_PV: Tensor, longest: int) -> str:
    found_PV, moved_PV = (_packed_logits(model, b, longest) for b in (batch, _with_another_first_row(batch)))
    # What is said of the second row must stay as it is: a convolution or a state-space layer would carry the first
    # one's text into it. Experts that get other tokens may round otherwise.
    is_second = batch.answer >= _ROW
    second, moved = found_PV[is_second], moved_PV[is_second]
    if not bool((second - moved).abs().max() <= 8 * torch.finfo(model.dtype).eps * second.abs().max()):
        return "tokens meet outside of attention"
    if not agree(model, own_PV, found_PV):
        return "its attention is not plain"
    plain = [_forward(model, ids[is_token]) for ids, is_token in _rows(batch)]
    if not agree(model, own_PV, _at_answers(plain, batch)):
        return "its attention is not the usual one"
    with packed_attention.recorded_masks() as record:
        _longest_row(model, longest)
    return record.verdict()


def _packed_logits(model: Any, batch: Batch, longest: int) -> Tensor:
    inputs = packed_attention.packed_inputs(batch.input_ids, batch.position, batch.rows, batch.owner, longest)
    return answer_logits(model, inputs, batch.answer)[0]


def _with_another_first_row(batch: Batch) -> Batch:
    ids = batch.input_ids.clone()
    ids[_SHARED:_ROW] = ids[_SHARED:_ROW].flip(0)
    return replace(batch, input_ids=ids)


def _longest_row(model: Any, longest: int) -> None:
    """Run the model over a row of the longest prompts' length, where some architectures change, for its shapes."""
    row = torch.tensor([_tokens(model, longest)], device=model.device)
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    with _WithoutProducts():
        answer_logits(model, inputs, torch.tensor([longest - 1], device=model.device))


class _WithoutProducts(TorchDispatchMode):
    """Within it matrix products are zeros: positions and masks depend on none, and take a hundredth of the time."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = _FIRST_FACTOR.get(func.overloadpacket)
        if first is None:
            return func(*args, **(kwargs or {}))
        one, other = args[first : first + 2]
        return one.new_zeros(*one.shape[:-1], other.shape[-1])


_FIRST_FACTOR = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.baddbmm: 1}
