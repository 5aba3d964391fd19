"""Packed rows against the same rows padded, in values and gradients, and the laws of cutting into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.modeling import packed_attention
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.packing import Example, micro_batches, pack
from pipeline.modeling.probe import choose_rows
from pipeline.modeling.scoring import LabelScorer, label_loss

TASKS = ["a", "b"]


def _example(
    task: int, prompt: Sequence[int], words: Sequence[Sequence[int]] = ((7,), (8,)), name: str = "x"
) -> Example:
    target = (1.0, *[0.0] * (len(words) - 1))
    return Example(name, task, tuple(prompt), tuple(map(tuple, words)), target, False)


SHARING = [
    _example(0, [5, 6, 9, 30, 31, 32, 33, 34, 35]),
    _example(0, [5, 6, 9, 30, 40]),
    _example(0, [5, 6, 9, 30, 40], [(7, 2), (7, 3, 4), (8,)]),
    _example(1, [5, 6, 9, 30, 41, 42]),
    _example(1, [5, 6], [(9, 30, 41), (11,)]),
    _example(0, [50]),
]


def _losses_and_gradients(method: str, packed: bool, tasks: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    base = load_base(BaseModelConfig(num_layers=2, dtype="float32", packed_rows=packed))
    assert (base.config._attn_implementation == packed_attention.NAME) is packed
    adapted = build_adapter(AdapterConfig(method=method, r=4, lora_dropout=0.0), base, TASKS[:tasks])  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    batch = pack(SHARING)
    losses = label_loss(LabelScorer(adapted)(batch), batch)
    losses.sum().backward()
    return losses.detach(), {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["mtl_lora", "lora", "dora", "multilora", "moelora"])
def test_packed_rows_equal_padded_rows_in_losses_and_gradients(method: str) -> None:
    losses, gradients = _losses_and_gradients(method, packed=True)
    expected, expected_gradients = _losses_and_gradients(method, packed=False)
    torch.testing.assert_close(losses, expected, atol=2e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=2e-4, rtol=2e-4, msg=name)


def test_attention_in_bfloat16_is_that_in_float32_rounded_once() -> None:
    batch, generator = pack(SHARING), torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, heads, len(batch.input_ids), 8, generator=generator).bfloat16() for heads in (4, 2, 2)]
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        states = [x.to(dtype).requires_grad_() for x in drawn]
        out, _ = packed_attention.packed_attention(
            torch.nn.Module(), *states, None, packed_rows=packed_attention.PackedRows(batch.rows, batch.owner, 9)
        )
        assert out.dtype is dtype
        gradients = torch.autograd.grad(out, states, torch.ones_like(out))
        found[dtype] = [x.bfloat16() for x in (out, *gradients)]
    for one, other in zip(found[torch.bfloat16], found[torch.float32], strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_what_rows_of_a_task_begin_with_stands_once() -> None:
    batch = pack(SHARING)
    distinct = {
        (e.task, (e.prompt + w[:-1])[:n]) for e in SHARING for w in e.words for n in range(1, len(e.prompt + w))
    }
    assert len(batch.input_ids) == len(distinct)
    assert batch.num_tokens == sum(len(e.prompt) + sum(len(w) - 1 for w in e.words) for e in SHARING)


def test_activation_checkpointing_keeps_the_gradients() -> None:
    base = load_base(BaseModelConfig(num_layers=2, dtype="float32"))
    adapted = build_adapter(AdapterConfig(r=4, lora_dropout=0.0), base, TASKS)
    scorer, batch = LabelScorer(adapted).train(), pack(SHARING)
    gradients = []
    for is_on in (False, True):
        if is_on:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted.zero_grad()
        label_loss(scorer(batch), batch).sum().backward()
        gradients.append([p.grad.clone() for p in adapted.parameters() if p.grad is not None])
    assert len(gradients[0]) == 4 * 2 * 4
    torch.testing.assert_close(gradients[0], gradients[1])


rows = st.lists(st.integers(0, 3), min_size=1, max_size=8)


@given(st.lists(st.tuples(st.integers(0, 2), rows), min_size=1, max_size=20), st.integers(1, 20), st.integers(1, 6))
def test_micro_batches_hold_each_example_once_within_the_budget(
    drawn: list[tuple[int, list[int]]], max_tokens: int, at_least: int
) -> None:
    examples = [_example(task, prompt) for task, prompt in drawn]
    parts = micro_batches(examples, max_tokens, at_least=at_least)
    assert sorted(i for part in parts for i in part) == list(range(len(examples)))
    assert len(parts) >= min(at_least, len(examples))
    for part in parts:
        assert len(part) == 1 or len(pack([examples[i] for i in part]).input_ids) <= max_tokens


@given(st.lists(st.tuples(st.integers(0, 2), rows), min_size=1, max_size=20))
def test_every_node_is_owned_by_a_place_of_its_own(drawn: list[tuple[int, list[int]]]) -> None:
    batch = pack([_example(task, prompt) for task, prompt in drawn])
    flat = torch.cat([group.flatten() for group in batch.rows])
    assert torch.equal(flat[batch.owner], torch.arange(len(batch.input_ids)))
    columns = torch.cat([torch.arange(group.shape[1]).repeat(len(group)) for group in batch.rows])
    assert torch.equal(columns[batch.owner], batch.position)


def test_rows_cut_to_a_number_of_examples() -> None:
    examples = [_example(0, [n]) for n in range(5)]
    assert [len(part) for part in micro_batches(examples, 100, max_examples=2)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("family", "takes"), [("llama", True), ("gpt2", True), ("lfm2", False), ("recurrent_gemma", False)]
)
def test_models_in_which_tokens_meet_outside_of_attention_take_no_packed_rows(family: str, takes: bool) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    more: dict[str, Any] = {} if family == "gpt2" else {"intermediate_size": 64, "num_key_value_heads": 1}
    if family == "lfm2":
        more["layer_types"] = ["conv", "conv", "full_attention", "conv"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **more))
    before = model.config._attn_implementation
    reason = choose_rows(model.eval(), BaseModelConfig(max_length=16))
    assert (reason is None) is takes
    assert model.config._attn_implementation == (packed_attention.NAME if takes else before)
