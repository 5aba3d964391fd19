"""A base in 4 or 8 bit: which layers hold codes, what they take, and that its adapter fits the plain base too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import InputError
from pipeline.modeling.adapter import AdapterConfig, build_adapter, load_adapter
from pipeline.modeling.base_model import BaseModelConfig, base_settings, empty_base, load_base, save_text_side
from pipeline.modeling.quantization import quantized_layers, quantized_loading
from pipeline.serving.offloaded_base import offloaded_base
from pipeline.training.counts import count_model
from pipeline.training.memory import rank_memory
from tests.pipeline.modeling.tiny import tiny_encoder_folder, tiny_folder
from tests.pipeline.training.ranks import text_tasks

TASKS = ["clicks", "relevance"]
ADAPTER = AdapterConfig(r=4, target_modules="all-linear")
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> BaseModelConfig:
    folder = tiny_folder(tmp_path_factory.mktemp("base"), "llama", **SHAPE)
    return BaseModelConfig(base=str(folder), dtype="bfloat16", max_length=64)


def _held(config: BaseModelConfig, kind: str | None) -> BaseModelConfig:
    return config.model_copy(update={"quantization": kind})


def _bytes(model: torch.nn.Module) -> int:
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            held = [state.absmax, state.code, state.state2.absmax, state.state2.code]
            total += sum(t.numel() * t.element_size() for t in held)
    return total


def test_the_linear_layers_but_the_head_hold_codes(plain: BaseModelConfig) -> None:
    expected = set(quantized_layers(empty_base(plain)))
    for kind, dtype in (("4bit", torch.uint8), ("8bit", torch.int8)):
        model: Any = load_base(_held(plain, kind))
        codes = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.dtype == dtype}
        assert codes == expected
        assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_a_plan_takes_4_bit_for_what_it_takes(plain: BaseModelConfig) -> None:
    counts = count_model(empty_base(plain), ADAPTER, text_tasks())
    held = rank_memory(counts, num_ranks=1, zero_stage=1, width=2, quantization="4bit").weights
    assert held == pytest.approx(_bytes(load_base(_held(plain, "4bit"))), rel=0.1)  # a table of 16 values a layer
    assert held < 0.35 * rank_memory(counts, num_ranks=1, zero_stage=1, width=2).weights


@pytest.mark.parametrize("method", ["mtl_lora", "lora"])
def test_gradients_reach_every_layer_after_the_proof_of_scores(plain: BaseModelConfig, method: str) -> None:
    for kind in ("4bit", "8bit"):
        shape = ADAPTER.model_copy(update={"method": method})
        model: Any = build_adapter(shape, load_base(_held(plain, kind)), TASKS)
        model(input_ids=torch.tensor([[5, 9, 20, 31]]), task_ids=1).logits.float().pow(2).sum().backward()
        ups = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
        assert len(ups) == 7 * SHAPE["num_hidden_layers"]
        assert all(grad is not None and grad.norm() > 0 for grad in ups.values())


@pytest.mark.parametrize("method", ["mtl_lora", "lora"])
def test_an_adapter_knows_the_codes_it_was_trained_on_and_fits_the_plain_base(
    tmp_path: Path, plain: BaseModelConfig, method: str
) -> None:
    shape = ADAPTER.model_copy(update={"method": method})
    build_adapter(shape, load_base(_held(plain, "4bit")), TASKS).save_pretrained(tmp_path / "adapter")
    load_adapter(load_base(_held(plain, "4bit")), tmp_path / "adapter", TASKS)
    for other in (None, "8bit"):
        with pytest.raises(InputError, match=f"another quantization \\(4bit then, {other or 'none'} now"):
            load_adapter(load_base(_held(plain, other)), tmp_path / "adapter", TASKS)
    with offloaded_base(_held(plain, "4bit")) as base:
        adapted = base.adapted(tmp_path / "adapter", TASKS)
        inputs = {"input_ids": torch.tensor([[5, 9, 20, 31]])}
        adapted.export_task("clicks", tmp_path / "exported", inputs, elsewhere=base)
        whole = build_adapter(shape, load_base(plain), TASKS)
        assert adapted.base_fingerprint() == whole.base_fingerprint()  # servers hold the plain base
    model: Any = load_base(plain)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    model.save_pretrained(tmp_path / "other")
    save_text_side(plain, tmp_path / "other")
    with (
        offloaded_base(_held(plain, "4bit").model_copy(update={"base": str(tmp_path / "other")})) as base,
        pytest.raises(InputError, match="the same shapes with other values"),
    ):
        base.adapted(tmp_path / "adapter", TASKS)


def test_what_cannot_be_quantised_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = BaseModelConfig(base=str(tiny_encoder_folder(tmp_path / "bert", "bert")), max_length=64)
    with pytest.raises(InputError, match="needs a language model that reads text alone"):
        base_settings(_held(encoder, "4bit"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package bitsandbytes, which is not installed; install it"):
        quantized_loading(_held(encoder, "8bit"), torch.bfloat16, "cpu")
