"""Every exported task answers as the multi-task model, by PEFT alone; one that does not is held back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_lora.hashes import write_hashes
from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import HeldBack, InputError
from pipeline.evaluation.parity import export_parity, exported_scorer
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.predictor import PredictorSpec

TASKS = (
    TaskSpec(name="first", template="{text}\nRelevant?", label_words=(" no", " yes")),
    TaskSpec(name="second", kind="multiclass", template="{text}\nTopic:", label_words=(" travel", " sport", " money")),
    TaskSpec(
        name="written", kind="generation", template="{text}\nColour:", generation={"max_new_tokens": 6, "num_beams": 2}
    ),
)
SAMPLES = [
    Sample(
        key=f"{task.name}{i}",
        task=task.name,
        fields={"text": f"a text about {'shoes ' * i}"},
        label=0,
        answers=("red",) if task.kind == "generation" else (),
    )
    for task in TASKS
    for i in range(3)
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("parity")
    base = BaseModelConfig(num_layers=1)
    torch.manual_seed(0)
    adapted: Any = build_adapter(AdapterConfig(), load_base(base), [t.name for t in TASKS])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "adapter")
    PredictorSpec(tasks=TASKS, base=base).write(folder / "adapter" / "predictor.json")
    exports = {task.name: folder / task.name for task in TASKS}
    for name, target in exports.items():
        adapted.export_task(name, target)
    return folder / "adapter", exports


@pytest.mark.slow
def test_an_export_is_loaded_without_a_question_to_the_hub(
    exported: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(name: str, *_: object, **__: object) -> None:
        raise AssertionError(f"asked the Hub for {name}")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", asked)
    spec = PredictorSpec.read(exported[0] / "predictor.json")
    assert len(exported_scorer(exported[1]["first"], spec).probabilities(SAMPLES[:1])) == 1


@pytest.mark.slow
def test_exports_agree_and_swapped_or_missing_ones_are_refused(exported: tuple[Path, dict[str, Path]]) -> None:
    adapter, exports = exported
    found = export_parity(adapter, exports, SAMPLES)
    assert set(found) == {"first", "second", "written"}
    assert max(found.values()) < 2e-3
    weights = exports["first"] / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: 1.2 * tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(HeldBack, match=r"'first' is not: .*adapter_model.safetensors must be as it was written"):
        export_parity(adapter, exports, SAMPLES)
    write_hashes(exports["first"], "adapter_model.safetensors")  # whole files, but of another adapter
    with pytest.raises(HeldBack, match="'first' differs by"):
        export_parity(adapter, exports, SAMPLES)
    save_file(tensors, weights, {"format": "pt"})
    write_hashes(exports["first"], "adapter_model.safetensors")
    with pytest.raises(InputError, match="'second' must have an exported PEFT folder"):
        export_parity(adapter, {"first": exports["first"]}, SAMPLES)
    with pytest.raises(InputError, match="'second' must have a holdout sample"):
        export_parity(adapter, exports, SAMPLES[:3])
    weights = exports["written"] / "adapter_model.safetensors"
    save_file({name: -3 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    write_hashes(exports["written"], "adapter_model.safetensors")
    with pytest.raises(HeldBack, match="'written' differs by"):
        export_parity(adapter, exports, SAMPLES)
