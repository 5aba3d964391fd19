"""An encoder's last layer, computed for the rows' first tokens alone, is the whole layer's at these."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtl_lora import AdapterModel
from mtl_lora.routing import Router
from pipeline.modeling.answering import sample_encoder
from pipeline.modeling.base_model import load_base
from pipeline.modeling.head_scoring import HeadScorer
from pipeline.modeling.layer_cut import checkpoint_layers, numbered_layers
from pipeline.modeling.packing import Batch, pack
from pipeline.modeling.scoring import label_loss
from tests.pipeline.modeling.test_encoders import SAMPLES, TASKS, _adapted, _config
from tests.pipeline.modeling.test_frozen_part import LAYERS
from tests.pipeline.modeling.test_frozen_part import _Case as FrozenCase

KINDS = ["bert", "eurobert", "modernbert", "roberta", "roberta-prelayernorm"]
"""Norms behind a layer's parts, before them, and before attention within its own module."""


def _case(folder: Path, kind: str, **changes: str) -> tuple[AdapterModel, Batch]:
    config = _config(folder, kind, **changes)
    return _adapted(load_base(config)), pack(sample_encoder(config, TASKS).encode(SAMPLES))


def _whole(adapted: AdapterModel) -> None:
    """Let the model's last layer give all nodes, as it does by itself."""
    adapted.base_model.row_reading = replace(adapted.base_model.row_reading, ends_with_answers=False)  # type: ignore


def _without_dropout(adapted: AdapterModel) -> AdapterModel:
    for module in adapted.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return adapted


def _losses_and_gradients(adapted: AdapterModel, batch: Batch) -> list[torch.Tensor]:
    adapted.zero_grad()
    losses = label_loss(HeadScorer(adapted)(batch), batch)
    losses.sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in adapted.parameters() if p.grad is not None)]


def _assert_close(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other) > 1
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_whole_layer(tmp_path: Path, kind: str, checkpoints: bool) -> None:
    adapted, batch = _case(tmp_path, kind)
    if checkpoints:
        checkpoint_layers(adapted.base_model)
        _without_dropout(adapted).train()
    assert adapted.base_model.row_reading.ends_with_answers
    found = _losses_and_gradients(adapted, batch)
    _whole(adapted)
    _assert_close(found, _losses_and_gradients(adapted, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_behind_attention_the_last_layer_computes_one_node_a_row(tmp_path: Path, kind: str) -> None:
    adapted, batch = _case(tmp_path, kind)
    seen: list[int] = []
    layers = numbered_layers(adapted.base_model)
    for layer in layers:
        linear = [module for module in layer.modules() if hasattr(module, "in_features")]
        linear[-1].register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[-2]))
    HeadScorer(adapted)(batch)
    assert seen == [len(batch.input_ids)] * (len(layers) - 1) + [len(batch.answer)]


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_above_states_that_are_given_only_answers_go_on(tmp_path: Path, kind: str) -> None:
    case = FrozenCase(tmp_path, kind, LAYERS - 1, lora_dropout=0)
    batch = pack(case.examples)
    _without_dropout(case.adapted)
    expected = case.gradients(batch)
    case.scorer.frozen = case.find()
    assert case.scorer.frozen.layers.cut == LAYERS - 1
    _assert_close(case.gradients(batch), expected)


def test_a_copy_computes_with_its_own_layer(tmp_path: Path) -> None:
    adapted, batch = _case(tmp_path, "bert")
    twin = copy.deepcopy(adapted)
    before = HeadScorer(adapted)(batch)
    with torch.no_grad():
        for parameter in numbered_layers(twin.base_model)[-1].parameters():
            parameter.zero_()
    assert torch.equal(HeadScorer(adapted)(batch), before)
    assert not torch.equal(HeadScorer(twin)(batch), before)


def test_mean_pooling_reads_every_node(tmp_path: Path) -> None:
    adapted, batch = _case(tmp_path, "bert", pooling="mean")
    found = HeadScorer(adapted)(batch)
    _whole(adapted)
    assert torch.equal(found, HeadScorer(adapted)(batch))


def test_a_narrowed_router_gives_some_tokens_ids_and_then_all_again() -> None:
    router, ids = Router(), torch.tensor([[0, 0, 1, 1, 2]])
    with router.route(ids):
        with router.narrowed(torch.tensor([0, 2, 4])):
            assert router.current().tolist() == [[0, 1, 2]]
            with router.narrowed(None):
                assert router.current() is ids
        assert router.current() is ids
