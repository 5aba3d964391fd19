"""What is saved is loaded, exactly, and anything else is refused with the difference named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_lora import MTLLoRAConfig, MTLLoRAModel
from mtl_lora.errors import AdapterFileError, BaseMismatchError, MTLLoRAError
from mtl_lora.files import CONFIG_FILE, WEIGHTS_FILE, fingerprint
from mtl_lora.hashes import HASHES_FILE, write_hashes
from tests.mtl_lora.conftest import Stack, make_model


def _base(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Stack(**options).to(dtype)


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("transform", ["full", "diagonal"])
@pytest.mark.parametrize("extras", [{}, {"modules_to_save": ["head"], "bias": "all", "train_layer_norms": True}])
def test_save_then_load_is_the_identity(tmp_path, transform, extras):
    model = make_model(transform=transform, use_rslora=True, **extras)
    with torch.no_grad():
        for name in model.extra_parameter_names:
            model.base_model.get_parameter(name).add_(0.5)
    model.save_pretrained(tmp_path)
    loaded = MTLLoRAModel.from_pretrained(_base(), tmp_path)
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    assert loaded.adapter_config == model.adapter_config
    assert torch.equal(loaded(x, task_ids=[2, 0, 1]), model(x, task_ids=[2, 0, 1]))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_only_what_trains_is_written(folder):
    suffixes = {name.rsplit(".", 1)[-1] for name in load_file(folder / WEIGHTS_FILE)}
    assert suffixes == {"lora_A", "lora_B", "lora_transform", "lora_mixing"}
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG_FILE, HASHES_FILE, WEIGHTS_FILE])


def test_another_bases_values_are_refused(folder):
    torch.manual_seed(5)
    with pytest.raises(BaseMismatchError, match="same shapes with other values"):
        MTLLoRAModel.from_pretrained(Stack().double(), folder)


def test_another_bases_shape_is_refused(folder):
    with pytest.raises(BaseMismatchError, match="other tensors or shapes"):
        MTLLoRAModel.from_pretrained(_base(depth=3), folder)


def test_one_checkpoint_has_one_fingerprint_in_every_type():
    half = {name: value.bfloat16() for name, value in _base().state_dict().items()}
    full = {name: value.float() for name, value in half.items()}
    assert fingerprint(half.items()) == fingerprint(full.items())
    assert fingerprint(_base().to("meta").named_parameters()) is None


def _edit_config(folder, **changes):
    path = folder / CONFIG_FILE
    description = json.loads(path.read_text())
    for key, value in changes.items():
        (description if key in description else description["config"])[key] = value
    path.write_text(json.dumps(description))
    write_hashes(folder, CONFIG_FILE)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"r": 3}, AdapterFileError, "of another shape"),
        ({"task_names": ["a", "b"]}, AdapterFileError, "of another shape"),
        ({"num_up_projections": 2}, AdapterFileError, r"lora_B \(3, 12, 2\) instead of \(2, 12, 2\)"),
        ({"target_modules": ["first"]}, AdapterFileError, "8 surplus"),
        ({"version": 99}, AdapterFileError, "must be 1, got 99"),
        ({"method": "moelora"}, AdapterFileError, "got 'moelora'"),
        ({"surprise": 1}, AdapterFileError, f"{CONFIG_FILE} must hold a valid .* got \\['surprise'\\]"),
    ],
)
def test_another_configuration_is_refused(folder, changes, error, message):
    _edit_config(folder, **changes)
    with pytest.raises(error, match=message):
        MTLLoRAModel.from_pretrained(_base(), folder)


def test_another_task_list_is_refused(folder):
    with pytest.raises(AdapterFileError, match=r"\['b', 'a', 'c'\], got \['a', 'b', 'c'\]"):
        MTLLoRAModel.from_pretrained(_base(), folder, task_names=["b", "a", "c"])


@pytest.mark.parametrize("is_surplus", [False, True])
def test_a_missing_or_surplus_tensor_is_named(folder, is_surplus):
    tensors = load_file(folder / WEIGHTS_FILE)
    if is_surplus:
        tensors["stray"] = torch.zeros(1)
    else:
        del tensors["blocks.0.first.lora_A"]
    save_file(tensors, folder / WEIGHTS_FILE)
    write_hashes(folder, WEIGHTS_FILE)
    message = r"1 surplus \(stray\)" if is_surplus else r"1 missing \(blocks.0.first.lora_A\)"
    with pytest.raises(AdapterFileError, match=message):
        MTLLoRAModel.from_pretrained(_base(), folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_an_incomplete_folder_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(AdapterFileError, match=name):
        MTLLoRAModel.from_pretrained(_base(), folder)


def test_a_gathered_state_dict_must_cover_the_adapter(tmp_path):
    model = make_model()
    tensors = {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=tensors)
    tensors.popitem()
    with pytest.raises(AdapterFileError, match="1 missing"):
        model.save_pretrained(tmp_path, state_dict=tensors)


def test_a_merged_model_is_not_saved(tmp_path):
    model = make_model()
    model.merge("a")
    with pytest.raises(MTLLoRAError, match="unmerge"):
        model.save_pretrained(tmp_path)


def test_fp32_adapters_by_default_on_a_half_precision_base():
    config = MTLLoRAConfig(["a"], target_modules=["first"])
    layer = MTLLoRAModel(_base(torch.bfloat16), config).base_model.blocks[0].first
    assert (layer.weight.dtype, layer.lora_A.dtype) == (torch.bfloat16, torch.float32)
