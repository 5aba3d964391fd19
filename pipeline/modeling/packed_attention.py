"""Attention among the rows of a packed batch, for any Hugging Face model that takes its attention from outside.

The model computes its M nodes as one sequence; here, and only here, they are gathered into rows. Queries of shared
nodes are computed in every row that holds them and taken from one: attention is a few hundredths of a layer's work at
the lengths of prompts. Without packed rows the function is the model's usual scaled dot-product attention.

Axes: M nodes, B rows, S sequence, H heads, D size of a query's and a key's head, E size of a value's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "packed_rows"
_HARMLESS = ("position_ids", "cache_position")
"""Tensors that models hand on and plain attention does not read; any other one changes what is attended to."""


def is_packed(model: Any) -> bool:
    """Whether a Hugging Face model's text is attended to by :func:`packed_attention`."""
    return bool(model.config.get_text_config(decoder=True)._attn_implementation == NAME)


@dataclass(frozen=True)
class PackedRows:
    """The rows of a :class:`pipeline.modeling.packing.Batch`, handed through the model to its attention."""

    groups: tuple[Tensor, ...]
    """Rows of like length, each (B, S): the nodes of each row."""
    owner: Tensor
    """(M,) for each node one place of it in the groups, flattened one after another."""
    longest: int
    """Tokens of the longest row that must be served."""
    masks: tuple[Tensor | None, ...] = ()
    """For each group which of its places are no padding, (B, S), None where all are: then every token of a row sees
    every other. Empty: each sees those before it."""
    answer: Tensor | None = None
    """(P,) nodes whose states alone are asked for (see :mod:`pipeline.modeling.answer_rows`), the first one of each
    row; None: all."""
    only_answers: bool = False
    """Whether these alone attend, in the last layer; the others get zeros."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_rows: PackedRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each row: causally, or both ways.

    Args:
        module: the model's attention layer.
        query: (1, H, M, D), position already in it; ``key`` (D) and ``value`` (E) with as many or fewer heads.
        attention_mask: for the usual attention.
        scaling: of the scores; None for D to the power -1/2.
        dropout: on the attention weights.
        packed_rows: the batch's rows; None for the usual attention.
        kwargs: what models hand to every attention function.

    Returns:
        (1, M, H, E).

    Raises:
        NotImplementedError: the model asks for more than plain causal attention over the longest row.
    """
    if packed_rows is None:
        if (record := _record.get()) is not None:
            record.attend(attention_mask)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if (attending := _attending.get()) is not None:
        attending.append(module)
    window = kwargs.get("sliding_window")
    asked = [n for n, x in kwargs.items() if (n == "softcap" and x) or (isinstance(x, Tensor) and n not in _HARMLESS)]
    is_causal = not packed_rows.masks
    if asked or (is_causal and window and window < packed_rows.longest):
        raise NotImplementedError(
            f"packed rows need plain attention over {packed_rows.longest} tokens, {type(module).__name__} asks for "
            f"{asked[0] if asked else f'a window of {window}'}"
        )
    num_nodes, dtype = query.shape[2], query.dtype
    # torch's backward of attention in bfloat16 takes two to five times as long on a CPU as in float32.
    inner = torch.float32 if query.device.type == "cpu" else dtype
    nodes = [(states[0].transpose(0, 1).flatten(1).to(inner), states.shape[3]) for states in (query, key, value)]
    out = []
    for rows, is_token in zip(packed_rows.groups, packed_rows.masks or [None] * len(packed_rows.groups), strict=True):
        asking = rows[:, :1] if packed_rows.only_answers else rows
        # An embedding is the gather whose backward adds up fastest.
        q, k, v = (
            F.embedding(places, x).view(*places.shape, -1, size).transpose(1, 2)
            for places, (x, size) in zip((asking, rows, rows), nodes, strict=True)
        )
        mask = None if is_causal else _both_ways(rows, is_token, window)
        if mask is not None and packed_rows.only_answers:
            mask = mask[:, :, :1]
        o = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout, is_causal=is_causal, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
        )
        out.append(o.transpose(1, 2).flatten(2).flatten(0, 1))
    if packed_rows.only_answers:
        places = torch.cat([rows[:, 0] for rows in packed_rows.groups])
        given = torch.cat(out)
        owned = given.new_zeros(num_nodes, given.shape[1]).index_copy(0, places, given)
    else:
        owned = F.embedding(packed_rows.owner, torch.cat(out))
    return owned.view(1, num_nodes, -1, value.shape[3]).to(dtype), None


def _both_ways(rows: Tensor, is_token: Tensor | None, window: int | None) -> Tensor | None:
    """Return which places may see which, (B or 1, 1, S or 1, S), None where all may see all.

    A window is what models hand on: one more than the distance that is still seen.
    """
    mask = None if is_token is None else is_token[:, None, None]
    if window and window < rows.shape[1]:
        place = torch.arange(rows.shape[1], device=rows.device)
        is_near = (place[:, None] - place).abs() < window
        mask = is_near[None, None] if mask is None else mask & is_near
    return mask


@dataclass
class MaskRecord:
    """What attention a model asks for in its usual forward over one row: to be causal over all of it, and no more."""

    _made: list[tuple[Tensor, bool]] = field(default_factory=list)
    _objections: list[str] = field(default_factory=list)

    def make(self, mask: Tensor) -> None:
        """Note a mask that the model made of a rule; some models make more than their layers use."""
        self._made.append((mask, bool(mask[:, :, -1].all())))

    def attend(self, mask: Tensor | None) -> None:
        """Note a layer's attention and the mask it is given."""
        reaches_all = [r for made, r in self._made if mask is not None and mask.data_ptr() == made.data_ptr()]
        if not reaches_all:
            self._objections.append("a layer makes a mask of its own")
        else:
            self._objections.append("" if reaches_all[0] else "attention does not reach back over the longest prompts")

    def verdict(self) -> str:
        """Return why packed rows would attend otherwise, empty where they would not."""
        if not self._objections:
            return "its attention cannot be exchanged"
        return next(filter(None, self._objections), "")


_record: ContextVar[MaskRecord | None] = ContextVar("record", default=None)


@contextmanager
def recorded_masks() -> Iterator[MaskRecord]:
    """Record which masks a model whose attention is :data:`NAME` makes and uses within."""
    record = MaskRecord()
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


_attending: ContextVar[list[nn.Module] | None] = ContextVar("attending", default=None)


@contextmanager
def recorded_modules() -> Iterator[list[nn.Module]]:
    """Record which modules attend within packed rows inside, in order."""
    attending: list[nn.Module] = []
    token = _attending.set(attending)
    try:
        yield attending
    finally:
        _attending.reset(token)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    record = _record.get()
    if record is None:
        return sdpa_mask(*args, **kwargs)
    kwargs["allow_is_causal_skip"] = False  # a mask that is left out cannot be recognised
    mask = sdpa_mask(*args, **kwargs)
    if mask is not None:
        record.make(mask)
    return mask


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _mask)


def packed_inputs(
    input_ids: Tensor,
    position: Tensor,
    groups: tuple[Tensor, ...],
    owner: Tensor,
    longest: int | None = None,
    masks: tuple[Tensor | None, ...] = (),
    answer: Tensor | None = None,
) -> dict[str, Any]:
    """Return the arguments with which a model runs over the nodes of a packed batch as one sequence.

    Args:
        input_ids: (M,) token ids; ``position`` (M,) their places in their rows.
        position: see ``input_ids``.
        groups: as in :class:`PackedRows`.
        owner: as in :class:`PackedRows`.
        longest: None for that of the groups.
        masks: as in :class:`PackedRows`.
        answer: as in :class:`PackedRows`.
    """
    return {
        "input_ids": input_ids[None],
        "position_ids": position[None],
        "attention_mask": torch.empty(1, 1, 1, 1, device=input_ids.device),  # of four axes: handed on as it is
        "packed_rows": PackedRows(groups, owner, longest or max(rows.shape[1] for rows in groups), masks, answer),
    }
