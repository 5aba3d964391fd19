"""``task.json`` holds all that asks a task right, is read back as it was written, and tells damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtl_lora.hashes import write_hashes
from mtl_lora.serving import ServedBase
from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.serving.exported_task import TASK_FILE, ExportedTask
from pipeline.serving.openai_client import LabelClient

BASE = ServedBase("owner/name", "0" * 64)
TASKS = (
    TaskSpec(name="binary", template="{a}?", label_words=(" no", " yes"), length_normalized=True),
    TaskSpec(name="ordinal", kind="ordinal", template="{a}{{}}", label_words=(" x", " y"), label_values=(1, 2.5)),
    TaskSpec(name="choice", kind="choice", template="{a}", choices_field="options"),
    TaskSpec(name="text", kind="generation", template="{a}:", generation={"max_new_tokens": 7, "stop": ["."]}),
    TaskSpec(name="asked", template="{a}?", label_words=(" no", " yes"), answer_by="generation"),
)


def _written(folder: Path, task: TaskSpec = TASKS[0]) -> ExportedTask:
    tokens = tuple((i, i + 1) for i, _ in enumerate(task.label_words))
    asked = ExportedTask.of(task, BaseModelConfig(num_layers=3, max_length=77), BASE, tokens)
    (folder / TASK_FILE).write_text(asked.text)
    write_hashes(folder, TASK_FILE)
    return asked


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_what_is_written_is_read_and_asks_the_same(tmp_path: Path, task: TaskSpec) -> None:
    asked = _written(tmp_path, task)
    assert ExportedTask.read(tmp_path) == ExportedTask.read(tmp_path / TASK_FILE) == asked
    kept = {"name", "kind", "template", "label_words", "label_values", "choices_field", "length_normalized"}
    kept |= {"answer_by", "generation"}
    assert asked.spec.model_dump(include=kept) == task.model_dump(include=kept)


def test_the_file_names_lengths_and_the_base(tmp_path: Path) -> None:
    _written(tmp_path)
    found = json.loads((tmp_path / TASK_FILE).read_text())
    assert (found["schema"], found["max_length"], found["label_tokens"]) == (1, 77, [[0, 1], [1, 2]])
    assert found["base"] == {"name": "owner/name", "fingerprint": "0" * 64, "num_layers": 3, "note": ""}
    assert found["choices_field"] is None


def test_a_client_of_label_scores_refuses_a_task_that_is_answered_by_a_text(tmp_path: Path) -> None:
    for task in TASKS[-2:]:
        with pytest.raises(InputError, match=f"'{task.name}' is answered by a text: take the text of the server's"):
            LabelClient("http://localhost:1", _written(tmp_path, task), tokenizer=None)


def test_damage_and_other_versions_are_refused(tmp_path: Path) -> None:
    _written(tmp_path)
    file = tmp_path / TASK_FILE
    file.write_text(file.read_text().replace("{a}?", "{a}!"))
    with pytest.raises(InputError, match=r"task\.json must be as it was written"):
        ExportedTask.read(tmp_path)
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 2'))
    write_hashes(tmp_path, TASK_FILE)
    with pytest.raises(InputError, match="schema"):
        ExportedTask.read(tmp_path)


def test_an_export_without_the_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must hold task\.json, found none.*export anew"):
        ExportedTask.read(tmp_path)
