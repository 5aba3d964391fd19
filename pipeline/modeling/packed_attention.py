"""Attention among the rows of a packed batch, for any Hugging Face model that takes its attention from outside.

The model computes its M nodes as one sequence; here, and only here, they are gathered into rows. Queries of shared
nodes are computed in every row that holds them and taken from one: attention is a few hundredths of a layer's work at
the lengths of prompts. Without packed rows the function is the model's usual scaled dot-product attention.

Axes: M nodes, B rows, S sequence, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "packed_rows"
_PROBE = 6
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_rows: tuple[tuple[Tensor, ...], Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each row.

    Args:
        module: the model's attention layer.
        query: (1, H, M, D), position already in it; ``key`` and ``value`` with as many or fewer heads.
        attention_mask: for the usual attention.
        scaling: of the scores; None for D to the power -1/2.
        dropout: on the attention weights.
        packed_rows: rows and owners of a :class:`pipeline.modeling.packing.Batch`; None for the usual attention.
        kwargs: what models hand to every attention function.

    Returns:
        (1, M, H, D).
    """
    if packed_rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups, owner = packed_rows
    window = kwargs.get("sliding_window")
    longest = max(rows.shape[1] for rows in groups)
    if any(kwargs.get(name) is not None for name in _UNSUPPORTED) or (window and window < longest):
        raise NotImplementedError(
            f"packed rows need plain attention over {longest} tokens, {type(module).__name__} asks for "
            f"{ {k: v for k, v in kwargs.items() if v is not None} }; set model.packed_rows to false"
        )
    shape = query.shape[1], query.shape[3]
    # torch's backward of attention in bfloat16 takes two to five times as long on a CPU as in float32.
    dtype = torch.float32 if query.device.type == "cpu" else query.dtype
    nodes = [states[0].transpose(0, 1).flatten(1).to(dtype) for states in (query, key, value)]
    out = []
    for rows in groups:
        # An embedding is the gather whose backward adds up fastest.
        q, k, v = (F.embedding(rows, x).view(*rows.shape, -1, shape[1]).transpose(1, 2) for x in nodes)
        o = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
        )
        out.append(o.transpose(1, 2).reshape(-1, shape[0] * shape[1]))
    return F.embedding(owner, torch.cat(out)).view(1, -1, *shape).to(query.dtype), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def take_packed_rows(model: Any) -> bool:
    """Let a Hugging Face model take packed rows; return whether it can.

    Attention may be its only layer in which tokens meet: a convolution or a state-space layer would carry one row's
    text into the next. So it is tried: another first row must leave the second one's hidden states as they are.
    """
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False) or getattr(config, "attn_logit_softcapping", None):
        return False
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        return False
    if _rows_stay_apart(model):
        return True
    model.set_attn_implementation(before)
    return False


@torch.no_grad()
def _rows_stay_apart(model: Any) -> bool:
    was_training, device = model.training, model.get_input_embeddings().weight.device
    tokens = (torch.arange(2 * _PROBE, device=device) + 1) % model.config.get_text_config().vocab_size
    position = torch.arange(_PROBE, device=device).repeat(2)
    owner = torch.arange(2 * _PROBE, device=device)
    model.eval()
    try:
        one, other = (
            hidden_states(model.base_model, ids, position, (owner.view(2, _PROBE),), owner)[_PROBE:].float()
            for ids in (tokens, torch.cat([tokens[:_PROBE].flip(0), tokens[_PROBE:]]))
        )
    finally:
        model.train(was_training)
    rounding = 8 * torch.finfo(model.dtype).eps  # experts that get other tokens may round otherwise
    return bool((one - other).abs().max() <= rounding * one.abs().max())


def hidden_states(decoder: Any, input_ids: Tensor, position: Tensor, rows: tuple[Tensor, ...], owner: Tensor) -> Tensor:
    """Run a decoder over the nodes of a packed batch and return its last hidden states, (M, hidden)."""
    unread = torch.empty(1, 1, 1, 1, device=input_ids.device)  # a mask of four axes is handed on as it is
    out = decoder(
        input_ids=input_ids[None],
        position_ids=position[None],
        attention_mask=unread,
        use_cache=False,
        packed_rows=(rows, owner),
    )
    states: Tensor = out.last_hidden_state[0]
    return states
