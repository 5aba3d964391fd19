"""An exported task is an ordinary LoRA that gives the same outputs, or it is not written."""

import json
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mtl_lora import MTLLoRAConfig, MTLLoRAModel, verification
from mtl_lora.errors import ExportMismatchError, MTLLoRAError
from tests.mtl_lora.conftest import Stack, clone, make_model, randomise


def _llama_model(base, **options):
    config = MTLLoRAConfig(["a", "b"], **{"r": 4, "lora_dropout": 0.3, **options})
    return randomise(MTLLoRAModel(base, config))


def _served(base, folder, ids):
    from peft import PeftModel

    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(folder)).eval()(ids).logits


@pytest.mark.parametrize("transform", ["full", "diagonal"])
@pytest.mark.parametrize(
    "extras", [{}, {"modules_to_save": ["lm_head"], "train_layer_norms": True}, {"target_modules": "all-linear"}]
)
def test_peft_serves_an_exported_task_with_the_same_logits(tiny_llama, tmp_path, transform, extras):
    plain = clone(tiny_llama)
    model = _llama_model(tiny_llama, transform=transform, **extras)
    with torch.no_grad():
        for name in model.extra_parameter_names:
            model.base_model.get_parameter(name).mul_(1.1)
    folder = model.export_task("b", tmp_path / "b")
    ids = torch.randint(61, (3, 9))
    model.eval()
    with torch.no_grad():
        expected = model(ids, task_ids=1).logits
    torch.testing.assert_close(_served(plain, folder, ids), expected, rtol=1e-4, atol=1e-4)
    card = (folder / "README.md").read_text()
    assert "`b`" in card and "through PEFT" in card
    assert not list(tmp_path.glob(".*"))


def test_peft_serves_trained_biases_and_conv1d(tmp_path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=31, n_positions=32)).eval()
    plain = clone(base)
    model = _llama_model(base, target_modules=["c_attn", "c_fc"], bias="lora_only")
    with torch.no_grad():
        for name in model.extra_parameter_names:
            model.base_model.get_parameter(name).add_(0.3)
    folder = model.export_task("a", tmp_path / "a")
    ids = torch.randint(31, (2, 7))
    with torch.no_grad():
        expected = model.eval()(ids, task_ids="a").logits
    torch.testing.assert_close(_served(plain, folder, ids), expected, rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bases_of_other_types_are_exported_in_fp32(tiny_llama, tmp_path, dtype):
    from safetensors.torch import load_file

    folder = _llama_model(tiny_llama.to(dtype)).export_task("a", tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("has_peft", [True, False])
def test_a_mismatch_is_an_error_and_leaves_the_old_folder(tiny_llama, tmp_path, monkeypatch, has_peft):
    if not has_peft:
        monkeypatch.setitem(sys.modules, "peft", None)
    model = _llama_model(tiny_llama)
    folder = model.export_task("a", tmp_path / "a")
    card = (folder / "README.md").read_text()
    assert ("through PEFT" in card) is has_peft
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(verification, "_check_layers", lambda *_: None)
    spoiled = model.base_model.model.layers[1].self_attn.v_proj
    monkeypatch.setattr(spoiled, "factors", lambda task: tuple(1.05 * f for f in type(spoiled).factors(spoiled, task)))
    with pytest.raises(ExportMismatchError, match="the model's outputs"):
        model.export_task("a", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(tmp_path.glob(".*"))


def test_a_value_that_is_not_finite_is_a_mismatch(tiny_llama, tmp_path):
    model = _llama_model(tiny_llama)
    with torch.no_grad():
        model.base_model.model.layers[0].self_attn.q_proj.lora_B[0, 0, 0] = float("nan")
    with pytest.raises(ExportMismatchError):
        model.export_task("a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_any_base_is_compared_by_layers_and_by_given_inputs(tmp_path):
    model = make_model()
    folder = model.export_task("a", tmp_path / "layers")
    assert "every layer's weight change" in (folder / "README.md").read_text()
    folder = model.export_task("a", tmp_path / "inputs", example_inputs=(torch.randn(2, 3, 6, dtype=torch.float64),))
    assert "outputs" in (folder / "README.md").read_text()


def test_export_leaves_the_model_as_it_was(tiny_llama, tmp_path):
    model = _llama_model(tiny_llama, modules_to_save=["lm_head"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.export_task("a", tmp_path / "a")
    assert model.training and all(layer.training for layer in model.adapted_layers().values())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_export_all_writes_what_servers_need(tiny_llama, tmp_path):
    folders = _llama_model(tiny_llama).export_all(tmp_path)
    assert sorted(folders) == ["a", "b"] and all(path.is_dir() for path in folders.values())
    serving = json.loads((tmp_path / "serving.json").read_text())
    command = serving["vllm"]["command"]
    assert command[command.index("--max-lora-rank") + 1] == "8"
    assert {pair.split("=")[0] for pair in command[command.index("--lora-modules") + 1 :]} == {"a", "b"}
    assert serving["lorax"]["requests"]["a"] == {"adapter_id": "a", "adapter_source": "local"}


def test_a_merged_model_is_not_exported(tmp_path):
    model = make_model(base=Stack().double())
    model.merge("a")
    with pytest.raises(MTLLoRAError, match="unmerge"):
        model.export_task("a", tmp_path / "a")
