"""The base is called by its name, and where the model of that name would answer otherwise, written exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.contracts import TaskSpec
from pipeline.modeling.base_model import BaseModelConfig, load_base, load_tokenizer
from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec
from pipeline.serving.base import BASE_FOLDER, save_base, served_base
from pipeline.serving.exported_task import ExportedTask

TASK = TaskSpec(name="clicks", template="{text}?", label_words=(" no", " yes"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 base of three small layers with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "small-llama"
    tokenizer = load_tokenizer(BaseModelConfig())
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(settings).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_whole_local_folder_is_served_by_its_name(folder: Path, tmp_path: Path) -> None:
    base = served_base(BaseModelConfig(base=str(folder)), "0" * 64, tmp_path / "adapter", tmp_path / "export")
    assert (base.name, base.folder, base.command, base.note) == ("small-llama", None, (), "")
    quantized = BaseModelConfig(base=str(folder), quantization="4bit")
    base = served_base(quantized, "0" * 64, tmp_path / "adapter", tmp_path / "export")
    assert (base.name, base.folder, base.command) == ("small-llama", None, ())
    assert "held in 4bit by bitsandbytes" in base.note and "--quantization bitsandbytes" in base.note
    asked = ExportedTask.of(TASK, quantized, base, [(1,), (2,)])
    assert asked.base.quantization == "4bit" and asked.base.note == base.note


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, ["Q4_1"]), ({"num_layers": 2}, ["Q4_1", "first 2 layers"])],
)
def test_the_embedded_base_has_its_public_name_and_a_note(options: dict, words: list[str], tmp_path: Path) -> None:
    base = served_base(BaseModelConfig(**options), "0" * 64, tmp_path / "adapter", tmp_path / "export")
    assert base.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base.folder == BASE_FOLDER and all(word in base.note for word in words)
    assert str(tmp_path) not in " ".join(base.command)


@pytest.mark.parametrize("num_layers", [None, 2])
def test_the_written_base_is_the_one_that_was_trained_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_layers: int | None
) -> None:
    config = BaseModelConfig(base=str(folder), num_layers=num_layers)
    PredictorSpec(tasks=(TASK,), base=config).write(tmp_path / "adapter" / PREDICTOR_FILE)
    (tmp_path / "export").mkdir()
    monkeypatch.chdir(tmp_path / "export")  # where the commands of serving.json are run
    if num_layers is None:
        save_base("../adapter", BASE_FOLDER)
    else:
        base = served_base(config, None, tmp_path / "adapter", tmp_path / "export")
        exec(base.command[-1], {})
    written = AutoModelForCausalLM.from_pretrained(BASE_FOLDER)
    trained = load_base(config.model_copy(update={"packed_rows": False, "dtype": "float32"}))
    assert written.dtype == torch.bfloat16
    ours, theirs = trained.state_dict(), written.float().state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_tokenizer(BaseModelConfig(base=BASE_FOLDER))("a text?")["input_ids"]
