"""``adapter.size`` in a run: solved without weights, kept by warm starts, told with the counts of all methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.modeling.adapter import adapter_as_trained, build_adapter, check_shape, warm_adapter
from pipeline.modeling.adapter_config import AdapterConfig, AdapterSize, Method
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.training.checkpoint import adapter_sha256
from tests.pipeline.modeling.tiny import tiny_tokenizer

LIKE = {"like": "lora", "r": 16}


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer()), **sizes))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModelConfig:
    folder = tmp_path_factory.mktemp("base")
    _llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return BaseModelConfig(base=str(folder))


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_is_counted_and_the_model_trained_has_the_counted_size(base: BaseModelConfig, method: Any) -> None:
    config = AdapterConfig.model_validate({"method": method, "size": LIKE})
    trained, sizes = adapter_as_trained(config, base, 3)
    assert sizes is not None and sizes.parameters == 8 * 128 * 16
    assert [size.method for size in sizes.methods] == list(get_args(Method))
    built = build_adapter(config, _llama(), ["a", "b", "c"])
    total = sum(p.numel() for p in _llama().parameters())
    assert built.count_parameters()[0] == sizes.trained.parameters
    assert sizes.trained.share == pytest.approx(sizes.trained.parameters / total)
    assert trained == AdapterConfig(method=method, r=sizes.trained.r, lora_alpha=2 * sizes.trained.r)
    assert sizes.trained.is_met == (abs(built.count_parameters()[0] / sizes.parameters - 1) <= 0.03)


def test_a_size_that_no_rank_meets_is_said_with_the_nearest(base: BaseModelConfig) -> None:
    config = AdapterConfig(size=AdapterSize(r=1))
    sizes = adapter_as_trained(config, base, 3)[1]
    assert sizes is not None and sizes.trained.r == 1 and not sizes.trained.is_met
    assert f"{sizes.trained.parameters:,}, {sizes.trained.ratio:.3f} of it" in sizes.remark


def test_an_alpha_that_is_told_stays(base: BaseModelConfig) -> None:
    assert adapter_as_trained(AdapterConfig(size=AdapterSize(r=16), lora_alpha=5), base, 3)[0].lora_alpha == 5


@pytest.mark.parametrize("size", [{"r": 16}, {"like": "moelora", "r": 16}])
def test_a_size_comes_back_from_json_without_the_rank_that_it_decides(size: dict[str, Any]) -> None:
    for more in ({}, {"lora_alpha": 3.0}, {"lora_alpha": 16.0}):
        config = AdapterConfig.model_validate({"size": size, **more})
        again = AdapterConfig.model_validate_json(config.model_dump_json())
        assert again == config and again.model_dump() == config.model_dump()
        assert again.sized(5) == config.sized(5) and config.sized(5).lora_alpha == more.get("lora_alpha", 10)


@pytest.mark.parametrize(
    ("more", "words"), [({"r": 8}, "r and adapter.size exclude"), ({"rank_pattern": {"q_proj": 2}}, "one rank")]
)
def test_a_rank_beside_a_size_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        AdapterConfig.model_validate({"size": LIKE, **more})


def test_a_warm_start_keeps_its_rank_when_a_task_is_added(base: BaseModelConfig, tmp_path: Path) -> None:
    config = AdapterConfig.model_validate({"size": LIKE})
    first = build_adapter(config, _llama(), ["a"])
    first.save_pretrained(tmp_path)
    names = [f"task-{i}" for i in range(60)]
    fresh, _ = adapter_as_trained(config, base, 61)
    kept, sizes = adapter_as_trained(config, base, 61, tmp_path)
    assert fresh.r != kept.r == first.adapter_config.r  # so many tasks would ask for another rank
    assert sizes is not None and sizes.is_kept and f"rank {kept.r} is that of the adapter" in sizes.remark
    check_shape(kept, tmp_path)
    check_shape(config, tmp_path)
    again = warm_adapter(config, _llama(), tmp_path, ["a", *names])
    assert again.adapter_config.r == first.adapter_config.r
    assert again.count_parameters()[0] == sizes.trained.parameters
    with pytest.raises(InputError, match="r is"):
        check_shape(fresh, tmp_path)


def test_a_solved_rank_is_that_rank_to_a_checkpoint(base: BaseModelConfig) -> None:
    tasks = (TaskSpec(name="a", template="{text}", label_words=(" no", " yes")),)
    solved = adapter_as_trained(AdapterConfig(size=AdapterSize(r=16)), base, 1)[0]
    plain = AdapterConfig(r=solved.r, lora_alpha=solved.lora_alpha)
    assert adapter_sha256(solved, base, tasks) == adapter_sha256(plain, base, tasks)


def test_settings_that_came_later_change_no_digest_until_they_are_used() -> None:
    before = {
        "method": "mtl_lora",
        "r": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.05,
        "num_up_projections": 3,
        "temperature": 0.1,
        "transform": "full",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }
    assert AdapterConfig().identity() == before
    assert AdapterConfig(use_rslora=True).identity() == before | {"use_rslora": True}


def test_a_target_that_is_not_there_is_refused_before_anything_is_counted(base: BaseModelConfig) -> None:
    config = AdapterConfig(size=AdapterSize(r=16), target_modules=("query",))
    with pytest.raises(InputError, match=r"adapter: .*no match for \['query'\]"):
        adapter_as_trained(config, base, 3)
    with pytest.raises(InputError, match="adapter: "):
        build_adapter(config, nn.Sequential(nn.Linear(2, 2)), ["a"])


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"layers_to_transform": (0,), "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4.0}},
    ],
)
def test_an_adapter_begins_only_with_its_own_layers_and_patterns(options: dict[str, Any], tmp_path: Path) -> None:
    config = AdapterConfig.model_validate(options)
    assert AdapterConfig.model_validate_json(config.model_dump_json()) == config
    build_adapter(config, _llama(), ["a"]).save_pretrained(tmp_path)
    check_shape(config, tmp_path)
    with pytest.raises(InputError, match=f"{next(iter(options))} is"):
        check_shape(AdapterConfig(), tmp_path)
