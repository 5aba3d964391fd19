from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mtl_lora.files import CONFIG_FILE, WEIGHTS_FILE
from mtl_lora.hashes import HASHES_FILE
from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.modeling.adapter import AdapterConfig, adapter_description, build_adapter, check_shape, load_adapter
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec

METHODS = ("mtl_lora", "lora", "lora_per_task", "dora", "multilora", "moelora")


def _llama(tied: bool = True) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, tie_word_embeddings=tied, **sizes)).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "targets", ["all-linear", r".*\.layers\.1\..*(q|v)_proj", ("q_proj", "mlp.down_proj"), r"(?!.*mlp).*_proj"]
)
def test_targets_mean_what_they_mean_to_peft(method: Any, targets: Any) -> None:
    from peft import LoraConfig, get_peft_model

    ours = build_adapter(AdapterConfig(method=method, target_modules=targets), _llama(), ["a"])
    given = list(targets) if isinstance(targets, tuple) else targets
    theirs = get_peft_model(_llama(), LoraConfig(target_modules=given))
    names = (name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A"))
    assert set(ours.plain_layers()) == set(names)


@pytest.mark.parametrize("targets", ["all-linear", r".*q_proj", ("q_proj",)])
def test_a_configuration_comes_back_from_json_and_fits_the_adapter_made_by_it(tmp_path: Path, targets: Any) -> None:
    config = AdapterConfig(target_modules=targets)
    assert AdapterConfig.model_validate_json(config.model_dump_json()) == config
    build_adapter(config, _llama(), ["a"]).save_pretrained(tmp_path)
    check_shape(config, tmp_path)
    with pytest.raises(InputError, match="target_modules is"):
        check_shape(AdapterConfig(target_modules=("v_proj",)), tmp_path)


@pytest.mark.parametrize("targets", ["*_proj", "", "nothing", "q_proj"])
def test_expressions_that_are_none_or_match_nothing_are_bad_input(targets: str) -> None:
    with pytest.raises(InputError, match=r"adapter: .*target"):
        build_adapter(AdapterConfig(target_modules=targets), _llama(), ["a"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_the_output_head_is_refused_when_it_is_made(method: Any, tied: bool) -> None:
    config = AdapterConfig(method=method, target_modules=("q_proj", "lm_head"))
    with pytest.raises(InputError, match=r"output head.*'lm_head'"):
        build_adapter(config, _llama(tied), ["a"])


def test_an_adapter_on_the_output_head_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    from mtl_lora import MTLLoRAConfig, MTLLoRAModel

    MTLLoRAModel(_llama(tied=False), MTLLoRAConfig(["a"], target_modules=["lm_head"])).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="must not hold the output head"):
        load_adapter(_llama(tied=False), tmp_path)


@pytest.fixture
def predictor(tmp_path: Path) -> Path:
    base = nn.Sequential(nn.Linear(4, 4))
    build_adapter(AdapterConfig(r=1, target_modules=("0",)), base, ["a"]).save_pretrained(tmp_path)
    task = TaskSpec(name="a", template="{text}", label_words=(" no", " yes"))
    PredictorSpec(tasks=(task,), base=BaseModelConfig()).write(tmp_path / PREDICTOR_FILE)
    return tmp_path


def _read_all(folder: Path) -> None:
    PredictorSpec.read(folder / PREDICTOR_FILE)
    adapter_description(folder)
    torch.manual_seed(0)
    load_adapter(nn.Sequential(nn.Linear(4, 4)), folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, PREDICTOR_FILE, HASHES_FILE])
def test_any_flipped_byte_of_a_predictors_folder_is_bad_input_that_names_a_file(predictor: Path, name: str) -> None:
    whole = (predictor / name).read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (predictor / name).write_bytes(damaged)
        with pytest.raises(InputError, match=r"mtl_lora_config\.json|adapter_model\.safe|predictor\.json|SHA256SUMS"):
            _read_all(predictor)
        (predictor / name).write_bytes(whole)


def test_a_predictors_folder_from_before_there_were_hashes_is_read(predictor: Path) -> None:
    (predictor / HASHES_FILE).unlink()
    assert PredictorSpec.read(predictor / PREDICTOR_FILE).tasks[0].name == "a"
    assert adapter_description(predictor)["method"] == "mtl_lora"


def test_the_adapters_configuration_needs_no_torch() -> None:
    code = (
        "import sys, pipeline.modeling.adapter_config; print(*({'torch', 'ray', 'mtl_lora.model'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == []
