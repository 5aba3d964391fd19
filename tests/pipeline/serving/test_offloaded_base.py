"""A base is merged and exported from its files, a layer at a time, and what comes out is what a loaded one gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mtl_lora
from pipeline.errors import InputError
from pipeline.modeling.adapter import load_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.serving.offloaded_base import adapter_to_export, offloaded_base
from tests.pipeline.modeling.tiny import tiny_folder

TASKS = ["clicks", "relevance"]
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "mtl_lora", {}),
    ("llama", "lora", {"modules_to_save": ["lm_head"]}),
    ("llama", "dora", {}),
    ("llama", "moelora", {"train_layer_norms": True}),
    ("gpt2", "mtl_lora", {"bias": "all"}),
    ("gpt2", "lora", {"bias": "lora_only"}),
    ("mixtral", "multilora", {}),
]
IDS = [f"{kind}-{method}" for kind, method, _ in CASES]


def _trained(folder: Path, kind: str, method: str, options: dict[str, Any]) -> tuple[BaseModelConfig, Path]:
    config = BaseModelConfig(base=str(tiny_folder(folder / "base", kind)), dtype="float32", max_length=64)
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "o_proj"]
    model = mtl_lora.build_adapter(method, load_base(config), tuple(TASKS), r=4, target_modules=targets, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter")
    return config, folder / "adapter"


@pytest.mark.filterwarnings("ignore:.*experts:mtl_lora.errors.FrozenExpertsWarning")
@pytest.mark.parametrize(("kind", "method", "options"), CASES, ids=IDS)
def test_the_merged_files_are_those_of_a_loaded_model(
    tmp_path: Path, kind: str, method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, adapter = _trained(tmp_path, kind, method, options)
    monkeypatch.setattr("pipeline.serving.offloaded_base.SHARD_BYTES", 20_000)
    with offloaded_base(config) as base:
        assert all(p.is_meta for p in base.model.parameters())
        base.save_merged(base.adapted(adapter, TASKS), "relevance", tmp_path / "streamed")
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 1
    whole: Any = load_adapter(load_base(config), adapter, TASKS).merge_and_unload("relevance")
    whole.save_pretrained(tmp_path / "whole")
    found, expected = (_tensors(tmp_path / name) for name in ("streamed", "whole"))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert (tmp_path / "streamed/config.json").read_text() == (tmp_path / "whole/config.json").read_text()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    row = torch.tensor([[5, 9, 20, 31]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=row).logits, whole(input_ids=row).logits)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.filterwarnings("ignore:.*experts:mtl_lora.errors.FrozenExpertsWarning")
@pytest.mark.parametrize(("kind", "method", "options"), CASES, ids=IDS)
def test_an_export_and_its_check_are_those_of_a_loaded_model(
    tmp_path: Path, kind: str, method: str, options: dict[str, Any]
) -> None:
    config, adapter = _trained(tmp_path, kind, method, options)
    inputs = {"input_ids": torch.tensor([[5, 9, 20, 31]])}
    whole = load_adapter(load_base(config), adapter, TASKS).eval()
    with torch.no_grad():
        expected = whole(**inputs, task_ids=1).logits
    whole.export_task("relevance", tmp_path / "whole", inputs)
    with adapter_to_export(config, adapter, TASKS) as (adapted, elsewhere):
        assert adapted.base_fingerprint() == whole.base_fingerprint()
        assert elsewhere is not None
        with elsewhere.reading(adapted.eval()), torch.no_grad():
            torch.testing.assert_close(adapted(**inputs, task_ids=1).logits, expected)
        adapted.export_task("relevance", tmp_path / "streamed", inputs, elsewhere=elsewhere)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        frozen = [p for p in adapted.parameters() if not p.requires_grad]
        assert frozen and all(p.is_meta for p in frozen)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    _, adapter = _trained(tmp_path / "one", "llama", "mtl_lora", {})
    other, _ = _trained(tmp_path / "other", "llama", "mtl_lora", {})
    weights = Path(other.base) / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({name: 2 * t for name, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with offloaded_base(other) as base, pytest.raises(InputError, match="the same shapes with other values"):
        base.adapted(adapter, TASKS)


MEMORY = """
import sys
from pathlib import Path

import torch

import pipeline.serving.offloaded_base as module
from pipeline.modeling.base_model import BaseModelConfig, empty_base
from tests.memory import Peak, anonymous_bytes

for folder in map(Path, sys.argv[1:]):  # the first, a small one, imports what the work needs
    config = BaseModelConfig(base=str(folder / "base"), dtype="bfloat16", max_length=64)
    whole = sum(2 * p.numel() for p in empty_base(config).parameters())
    module.SHARD_BYTES = whole // 16
    peak, floor = Peak(), anonymous_bytes()
    with module.adapter_to_export(config, folder / "adapter", ["clicks", "relevance"]) as (adapted, elsewhere):
        inputs = {"input_ids": torch.tensor([[5, 9]])}
        adapted.export_task("clicks", folder / "exported", inputs, elsewhere=elsewhere)
    exported = peak.take() - floor
    with module.offloaded_base(config) as base:
        base.save_merged(base.adapted(folder / "adapter", ["clicks", "relevance"]), "clicks", folder / "merged")
    merged = peak.take() - floor
print("SHARES", exported / whole, merged / whole)
"""


@pytest.mark.slow
def test_no_more_than_a_shard_is_held(tmp_path: Path) -> None:
    for name, size in (("small", 16), ("large", 640)):
        folder = tmp_path / name
        shape = {"hidden_size": size, "intermediate_size": 4 * size, "num_hidden_layers": 12}
        base = BaseModelConfig(base=str(tiny_folder(folder / "base", "llama", **shape)), max_length=64)
        model = mtl_lora.build_adapter("mtl_lora", load_base(base), tuple(TASKS), r=2, target_modules=["q_proj"])
        model.save_pretrained(folder / "adapter")
    run = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shares = [float(word) for word in done.stdout.partition("SHARES")[2].split()]
    assert len(shares) == 2
    assert max(shares) < 0.25, shares
