"""What is said of served adapters: names that hold elsewhere, commands that run, refusals known before a server."""

import json
import re
from pathlib import Path

import pytest
import torch

from mtl_lora import MTLLoRAConfig, MTLLoRAModel, build_adapter
from mtl_lora.serving import ServedBase, base_name, serving_notice, write_serving
from tests.mtl_lora.conftest import clone, randomise


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("owner/name", "owner/name"),
        ("/data/models/llama-3-8b", "llama-3-8b"),
        ("/data/models/llama-3-8b/", "llama-3-8b"),
        ("../models/llama", "llama"),
        ("~/models/llama", "llama"),
        ("/home/me/.cache/huggingface/hub/models--owner--name-1b/snapshots/0123abcd", "owner/name-1b"),
    ],
)
def test_a_base_is_called_by_a_name_that_holds_elsewhere(reference, name):
    assert base_name(reference) == name


def test_a_relative_folder_is_called_by_its_last_part(tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_name("models/llama") == "llama"
    assert base_name("models/other") == "models/other"


def _exported(folder, **changes):
    plain = {"base_model_name_or_path": "owner/name", "r": 8, "use_dora": False, "bias": "none"}
    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
        config = {**plain, "modules_to_save": None, **changes}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return write_serving(folder, ["a", "b"])


@pytest.mark.parametrize(
    ("changes", "words", "lorax_serves"),
    [
        ({"use_dora": True}, "DoRA", False),
        ({"bias": "lora_only"}, "biases", False),
        ({"modules_to_save": ["lm_head"]}, "lm_head", False),
        ({"r": 513}, "rank 513", True),
        ({"task_type": "FEATURE_EXTRACTION"}, "a head beside", False),
        ({"target_modules": ["q_proj", "model.visual.blocks.0.attn.qkv"]}, "of a vision tower", False),
    ],
)
def test_what_vllm_refuses_stands_in_the_file_and_in_one_line(tmp_path, changes, words, lorax_serves):
    document = _exported(tmp_path, **changes)
    assert document == json.loads((tmp_path / "serving.json").read_text())
    assert document["vllm"]["command"] is None
    assert [words in reason for reason in document["vllm"]["refuses"]] == [True]
    assert (document["lorax"]["command"] is not None) is lorax_serves
    assert document["peft"]["python"]
    notice = serving_notice(document)
    assert notice.startswith("vLLM refuses these adapters because of") and words in notice and "\n" not in notice


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (16, 16), (17, 32), (64, 64), (400, 512)])
def test_the_command_allows_the_rank_and_says_where_the_default_would_not(tmp_path, rank, allowed):
    document = _exported(tmp_path, r=rank)
    command = document["vllm"]["command"]
    assert command[:3] == ["vllm", "serve", "owner/name"]
    assert command[command.index("--max-lora-rank") + 1] == str(allowed)
    assert document["vllm"]["refuses"] == []
    assert (f"--max-lora-rank {allowed}" in serving_notice(document)) is (rank > 16)


def test_a_changed_base_is_loaded_from_the_folder_that_its_command_writes(tmp_path):
    _exported(tmp_path)
    base = ServedBase("owner/name", "0" * 64, "base-model", ("python", "-c", "pass"), "it is cut")
    document = write_serving(tmp_path, ["a", "b"], base)
    assert document["base_model"] == "owner/name"
    assert document["base"]["load"] == "base-model" and document["base"]["command"] == ["python", "-c", "pass"]
    assert document["vllm"]["command"][2] == "base-model"
    assert "base-model" in document["lorax"]["command"]
    assert "from_pretrained('base-model')" in "".join(document["peft"]["python"])


def _model(base, **options):
    config = MTLLoRAConfig(["a", "b"], **{"r": 4, "lora_dropout": 0.0, **options})
    return randomise(MTLLoRAModel(base, config))


def _from_disk(tiny_llama, folder):
    tiny_llama.save_pretrained(folder)
    return type(tiny_llama).from_pretrained(folder)


def test_no_written_file_holds_a_path_of_this_machine(tiny_llama, tmp_path):
    base = _from_disk(tiny_llama, tmp_path / "cache" / "tiny-base")
    folders = _model(base).export_all(tmp_path / "export")
    for name, folder in folders.items():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "tiny-base"
        assert "base_model: tiny-base" in (folder / "README.md").read_text(), name
    texts = [path.read_text() for path in (tmp_path / "export").rglob("*") if path.suffix in (".json", ".md")]
    assert len(texts) == 5
    assert not any(str(tmp_path) in text or re.search(r"[\"' ]/[\w.]+/", text) for text in texts)


def test_the_peft_lines_of_serving_json_answer_as_the_model_does(tiny_llama, tmp_path, monkeypatch):
    base = _from_disk(tiny_llama, tmp_path / "export" / "tiny-base")
    model = _model(clone(base)).eval()
    model.export_all(tmp_path / "export")
    serving = json.loads((tmp_path / "export" / "serving.json").read_text())
    monkeypatch.chdir(tmp_path / "export")  # where commands are run, and the base lies by its name
    found: dict = {}
    exec("\n".join(serving["peft"]["python"]), found)
    ids = torch.randint(61, (2, 7))
    for task in ("a", "b"):
        exec(serving["peft"]["request"]["python"].replace("TASK", task), found)
        with torch.no_grad():
            expected, got = model(ids, task_ids=task).logits, found["model"].eval()(ids).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_refused_export_is_said_when_it_is_written(tiny_llama, tmp_path):
    model = build_adapter("dora", tiny_llama, ("a",), r=4)
    with pytest.warns(UserWarning, match="vLLM refuses these adapters because of DoRA"):
        model.export_all(tmp_path)
    assert "vLLM and LoRAX do not" in (tmp_path / "a" / "README.md").read_text()
    with pytest.warns(UserWarning, match="trained modules"):
        _model(type(tiny_llama)(tiny_llama.config), modules_to_save=["lm_head"]).export_all(tmp_path / "other")


def test_further_files_stand_in_the_list_of_hashes(tiny_llama, tmp_path):
    folder = _model(tiny_llama).export_task("a", tmp_path / "a", further_files={"task.json": "{}\n"})
    listed = Path(folder, "SHA256SUMS").read_text()
    assert (folder / "task.json").read_text() == "{}\n" and "  task.json\n" in listed
    assert "task.json" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank_pattern": {"q_proj": 4}}, "ranks that differ"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [2, 3]}, "some layers only"),
        ({"target_modules": ["model.layers.2.self_attn.q_proj"]}, "some layers only"),
    ],
)
def test_what_lorax_would_stack_or_leave_out_stands_in_the_file_and_vllm_serves_it(tmp_path, changes, words):
    document = _exported(tmp_path, **changes)
    assert document["vllm"]["refuses"] == [] and document["vllm"]["command"] is not None
    assert document["lorax"]["command"] is None
    assert [words in reason for reason in document["lorax"]["ignores"]] == [True]


def test_vllm_is_given_room_for_the_largest_rank_of_all_layers(tmp_path, tiny_llama):
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 40}}
    model = randomise(MTLLoRAModel(tiny_llama, MTLLoRAConfig(["a"], **options)))
    with pytest.warns(UserWarning, match="rank 40 is above vLLM's default"):
        model.export_all(tmp_path)
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (40, 40)
    assert written["rank_pattern"] == written["alpha_pattern"] == {"v_proj": 4}
    command = json.loads((tmp_path / "serving.json").read_text())["vllm"]["command"]
    assert command[command.index("--max-lora-rank") + 1] == "64"


def test_classifiers_of_different_labels_are_loaded_each_by_itself(tmp_path):
    document = _exported(tmp_path, task_type="SEQ_CLS", modules_to_save=["classifier"])
    assert document["vllm"]["command"] is None and document["peft"]["python"] == []
    assert "README.md" in document["peft"]["request"]["python"]
