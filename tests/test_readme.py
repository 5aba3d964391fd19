"""What the README and the cookbook tell a person to type is there, and does what it says."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from jobs import cli
from jobs.config import load_config
from jobs.config_views import schema
from jobs.stages.plan import memory
from jobs.tables import show_memory
from pipeline.contracts import TaskSpec
from tests.benchmarks.study import with_table
from tests.jobs.test_cli import Run, mtl_lora  # noqa: F401 - a fixture
from tests.pipeline.ingestion.foreign_tars import JPEG, members_of, write_tar
from tests.pipeline.made_images import image_bytes
from tests.pipeline.modeling.tiny_image_text import tiny_image_text_folder
from tests.pipeline.stream.test_stream import write_data
from tests.pipeline.training.layouts import layout_folder

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
COOKBOOK = (ROOT / "infra/docs/pages/cookbook.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT + COOKBOOK, re.MULTILINE | re.DOTALL)
LINES = [line.partition(" #")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines()]
COMMANDS = [line.partition(" -- ")[2] if line.startswith("ray ") else line for line in LINES]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("mtl-lora ")])
def test_each_command_is_one_that_the_command_takes(line: str) -> None:
    command: Any = typer.main.get_command(cli.app)
    _, *arguments = shlex.split(line)
    while arguments and arguments[0] in getattr(command, "commands", {}):
        command = command.commands[arguments[0]]
        name, *arguments = arguments
    if arguments == ["--install-completion"]:
        assert any("--install-completion" in option.opts for option in command.params)
        return
    if name == "submit":  # its verb's options are checked where it runs
        _, verb, *arguments = [*arguments[arguments.index("retrain") - 1 :]]
        command = typer.main.get_command(cli.app).commands[verb]  # type: ignore[attr-defined]
    command.make_context(name, list(arguments))


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_each_make_target_is_there(line: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line.split()[1] in targets


def test_each_file_and_folder_that_is_linked_is_there() -> None:
    linked = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert linked
    assert [link for link in linked if not (ROOT / link).exists()] == []


def test_the_table_of_the_comparison_is_what_its_results_say() -> None:
    assert with_table(TEXT) == TEXT


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b"])
def test_the_plans_of_memory_are_those_that_are_printed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    asked = [f"model.base={layout_folder(tmp_path, name)}", "model.dtype=bfloat16"]
    show_memory(memory(load_config(Path("ads"), [*asked, "training.activation_checkpointing=true"])))
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().err.splitlines())
    assert "zero_stage 3" in printed and printed in TEXT


@pytest.mark.parametrize("code", [block for kind, block in BLOCKS if kind == "python"])
def test_each_piece_of_python_can_be_read(code: str) -> None:
    ast.parse(code)


def test_the_adapter_alone_does_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
    values = {"base": base, "inputs": {"input_ids": torch.ones(2, 3, dtype=torch.long)}}
    values["task_ids"] = torch.tensor([1, 0])
    monkeypatch.chdir(tmp_path)
    exec(next(block for kind, block in BLOCKS if "MTLLoRAConfig" in block), values)
    assert (tmp_path / "clicks-lora" / "adapter_config.json").is_file()


def test_the_stream_in_webdatasets_pipeline_does_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "runs" / "cookbook" / "shards", {"clicked": [40, 30], "vertical": [26]})
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(next(block for kind, block in BLOCKS if "wds.DataPipeline" in block), values)
    assert values["saved"] == {"start_step": values["stream"].steps_per_epoch}


def _records(task: TaskSpec, split: str) -> list[dict[str, Any]]:
    rows = []
    for i in range(24):
        row: dict[str, Any] = {field: f"{split} {field} number {i}" for field in task.text_fields}
        if task.kind == "choice":
            row[task.choices_field] = ["this one", "that one"]
        row[task.label_field] = (
            task.label_values[i % len(task.label_values[:3])] if task.label_values else i % (task.num_classes or 2)
        )
        if task.kind == "multilabel":
            row[task.label_field] = [name for place, name in enumerate(task.class_names) if i >> place & 1]
        if task.kind == "generation":
            row[task.label_field] = [f"answer {i}", "another"]
        if task.label_map:
            row[task.label_field] = list(task.label_map)[i % len(task.label_map)]
        for field, value in ((task.group_field, f"g{i // 4}"), (task.weight_field, 1.5)):
            if field:
                row[field] = value
        for field, path in task.columns.items():
            if field in row:
                column, _, inner = path.partition(".")
                row[column] = {inner: row.pop(field)} if inner else row.pop(field)
        rows.append(row)
    return rows


def _write_tars(root: Path, task: TaskSpec) -> None:
    for name in ("train-0000", "train-0001", "train-0002", "train-0003", "test-0"):
        rows = [
            {"__key__": f"{name}/{i}", **row, "jpg": JPEG + bytes([i])} for i, row in enumerate(_records(task, name))
        ]
        write_tar(root / f"{name}.tar", members_of(rows))


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "yaml"])
def test_each_configuration_prepares_data_of_its_form(mtl_lora: Run, tmp_path: Path, block: str) -> None:  # noqa: F811
    root = tmp_path / "data"
    (tmp_path / "c.yaml").write_text(block)
    settings = [f"data.root={root}", f"run_root={tmp_path}/runs"]
    config = load_config(tmp_path / "c.yaml", settings)
    jsonschema.validate(yaml.safe_load(block), schema())
    if config.data.source == "records" and any(task.image_field for task in config.tasks):
        settings.append(f"model.base={tiny_image_text_folder(tmp_path / 'base', 'fast_vlm')}")
    for task in config.tasks:
        if config.data.source == "webdataset":
            _write_tars(root, task)
            continue
        (root / task.name).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            rows = _records(task, split)
            if task.image_field:
                for i, row in enumerate(rows):
                    row[task.image_field] = f"{split}{i}.png"
                    (root / task.name / f"{split}{i}.png").write_bytes(image_bytes("PNG", (i, i, len(split))))
            lines = [json.dumps(row) + "\n" for row in rows]
            (root / task.name / f"{split}.jsonl").write_text("".join(lines))
    done = mtl_lora("prepare", "--config", str(tmp_path / "c.yaml"), "--json", *settings)
    assert done.code == 0, done.err
    assert json.loads(done.out)["rejected"] == []


def test_a_strangers_first_steps(mtl_lora: Run, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "spam").mkdir()
    for split in ("train", "test"):
        rows = [{"text": f"{split} message {i}", "label": i % 2} for i in range(60)]
        (tmp_path / "spam" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = str(tmp_path / "run.yaml")
    assert mtl_lora("init", str(tmp_path), "--out", config).code == 0
    planned = mtl_lora("plan", "--no-calibrate", "--config", config, f"run_root={tmp_path}/runs", "model.num_layers=1")
    assert planned.code in (0, 3), planned.err  # 3: this machine is too small, which is an answer too
    assert "60" in planned.err
    shown = mtl_lora("config", "show", "--config", config)
    assert 'source: "records"  # file' in shown.out
