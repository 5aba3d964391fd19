"""Scores by heads: an encoder reads each row, its state goes to the task's head.

Axes as in :mod:`pipeline.modeling.packing`: M nodes, B rows, P rows in order, E examples, C classes, K terms; H hidden
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from mtl_lora import AdapterModel
from mtl_lora.heads import TaskHeads
from pipeline.modeling import packed_attention
from pipeline.modeling.packing import Batch
from pipeline.modeling.scoring import ClassScorer


@dataclass(frozen=True)
class RowReading:
    """How rows go into an encoder and a state comes out: its attribute ``row_reading``."""

    pooling: Literal["first", "mean"]
    """The state of a row: that of its first token, or the mean over all."""
    has_segments: bool
    """Whether the model knows two segments."""
    first_position: int = 0
    """Position of a row's first token in packed rows."""
    ends_with_answers: bool = False
    """Whether the last layer gives the states of packed rows' first tokens alone where only these are read."""


def row_states(model: Any, batch: Batch, routed: AbstractContextManager[Any]) -> Tensor:
    """Return the pooled state of each row, (P, H).

    Args:
        model: a Hugging Face encoder that has a :class:`RowReading`.
        batch: of examples with heads.
        routed: within it the model runs; entered here.
    """
    reading: RowReading = model.row_reading
    if model.config._attn_implementation == packed_attention.NAME:
        answer = batch.answer if reading.ends_with_answers and reading.pooling == "first" else None
        states_MH = _packed_states(model, batch, reading, routed, answer)
        if answer is not None:
            return states_MH
    else:
        states_MH = _padded_states(model, batch, reading, routed)
    if reading.pooling == "first":
        return states_MH[batch.answer]
    starts = torch.zeros(len(states_MH), dtype=torch.long, device=states_MH.device)
    row_M = starts.index_fill(0, batch.answer, 1).cumsum(0) - 1
    none_P = torch.zeros(len(batch.answer), device=states_MH.device)
    sums_PH = none_P[:, None].expand(-1, states_MH.shape[1]).index_add(0, row_M, states_MH.float())
    return sums_PH / none_P.index_add(0, row_M, torch.ones_like(row_M, dtype=none_P.dtype))[:, None]


def _packed_states(
    model: Any, batch: Batch, reading: RowReading, routed: AbstractContextManager[Any], answer: Tensor | None
) -> Tensor:
    position = batch.position + reading.first_position
    inputs = packed_attention.packed_inputs(
        batch.input_ids, position, batch.rows, batch.owner, masks=batch.row_masks, answer=answer
    )
    if reading.has_segments:
        inputs["token_type_ids"] = batch.token_type[None]
    with routed:
        states_1MH: Tensor = model(**inputs).last_hidden_state
    return states_1MH[0]


def _padded_states(model: Any, batch: Batch, reading: RowReading, routed: AbstractContextManager[Any]) -> Tensor:
    nodes, mask = batch.padded_nodes()
    inputs = {"input_ids": batch.input_ids[nodes], "attention_mask": mask.long()}
    if reading.has_segments:
        inputs["token_type_ids"] = batch.token_type[nodes]
    with routed:
        states_BSH: Tensor = model(**inputs).last_hidden_state
    return states_BSH.flatten(0, 1)[batch.padded_place(nodes)]


class HeadScorer(ClassScorer):
    """Scores the classes of mixed-task batches by the tasks' heads.

    Args:
        adapted: an encoder under any adapter with heads, or a plain encoder.
        heads: those that score instead of the adapter's; a plain encoder needs some.
    """

    def __init__(self, adapted: nn.Module, heads: TaskHeads | None = None) -> None:
        super().__init__(adapted)
        self.own_heads = heads

    def answer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the classes, (E, C), ``-inf`` where an example has no such class, a regression
        task's number on its head's scale, and the state of each example's first row, (E, H)."""
        is_packed = self.language_model.config._attn_implementation == packed_attention.NAME
        task_ids = batch.token_task[None] if is_packed else batch.token_task[batch.padded_nodes()[0][:, 0]]
        states_PH = row_states(self.language_model, batch, self._begun(batch, task_ids))
        heads = self.own_heads if self.own_heads is not None else self.adapted.task_heads
        score_K = heads(states_PH[batch.term_answer], batch.term_token)  # type: ignore[operator]
        examples, classes = batch.class_mask.shape
        scores = score_K.new_zeros(examples * classes).index_add(0, batch.term_slot, score_K * batch.term_weight)
        first_E = torch.full((examples,), len(states_PH), device=states_PH.device)
        first_E = first_E.scatter_reduce(0, batch.term_slot // classes, batch.term_answer, "amin")
        return _linked(scores.view(examples, classes), batch), states_PH[first_E]


def _linked(scores_EC: Tensor, batch: Batch) -> Tensor:
    """Return what each example's link makes of its scores."""
    log_p = scores_EC.masked_fill(~batch.class_mask, float("-inf")).log_softmax(-1)
    if not batch.has_links:
        return log_p
    each = logsigmoid(scores_EC).masked_fill(~batch.class_mask, float("-inf"))
    number = scores_EC.masked_fill(~batch.class_mask, 0.0)
    return torch.where(batch.links("sigmoid"), each, torch.where(batch.links("identity"), number, log_p))


class UntrainedHeadScorer(HeadScorer):
    """The base model alone with fresh heads, always the same ones: the adapter inside is switched off."""

    def __init__(self, adapted: nn.Module, classes: Sequence[int]) -> None:
        model: Any = adapted.base_model if isinstance(adapted, AdapterModel) else adapted
        parameter = next(model.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            heads = TaskHeads(model.config.hidden_size, classes)
        super().__init__(adapted, heads.to(parameter.device))

    def _routed(self, task_ids: Tensor, image_ids: Tensor | None = None) -> AbstractContextManager[None]:
        return self._without_adapter()
