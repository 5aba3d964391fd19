"""The verb leaves folders that are ready to serve: how each task is asked, how all are served, no path of here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.config import load_config
from jobs.main_job import run_stage
from jobs.run import Run
from mtl_lora.hashes import check_hashes
from pipeline.modeling.adapter import build_adapter
from pipeline.modeling.base_model import load_base
from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec
from pipeline.serving.exported_task import ExportedTask
from tests.jobs.test_cli import ROWS, _configuration


@pytest.fixture(scope="module", params=["mtl_lora", "dora"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp(request.param)
    options = ["model.num_layers=1", f"adapter.method={request.param}", "adapter.r=20"]
    config = load_config(Path(_configuration(folder, ROWS)), options)
    run = Run(config)
    run.folder.bind(config.digest())
    run_stage(run, "prepare")
    adapted: Any = build_adapter(config.adapter, load_base(config.model), [task.name for task in config.tasks])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(run.folder.adapter)
    PredictorSpec(tasks=config.tasks, base=config.model).write(run.folder.adapter / PREDICTOR_FILE)
    return run


def test_the_verb_leaves_all_that_serving_needs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.stages.export import export

    folders = export(run, run.folder.adapter)
    said = [line for line in capsys.readouterr().err.splitlines() if "vLLM" in line]
    (task,) = run.config.tasks
    folder = folders[task.name]
    check_hashes(folder)
    assert "  task.json\n" in (folder / "SHA256SUMS").read_text()
    asked = ExportedTask.read(folder)
    assert (asked.template, asked.label_words) == (task.template, task.label_words)
    assert asked.max_length == run.config.model.max_length
    assert asked.base.name == "HuggingFaceTB/SmolLM2-135M-Instruct" and asked.base.num_layers == 1
    assert re.fullmatch(r"[0-9a-f]{64}", asked.base.fingerprint or "")
    serving = json.loads((run.folder.exports / "serving.json").read_text())
    assert [adapter["path"] for adapter in serving["adapters"]] == [task.name]
    assert serving["base_model"] == asked.base.name and serving["base"]["fingerprint"] == asked.base.fingerprint
    if run.config.adapter.method == "dora":
        assert serving["vllm"]["command"] is None and len(said) == 1 and "DoRA" in said[0]
    else:
        assert serving["vllm"]["command"][-1] == f"{task.name}={task.name}"
        assert len(said) == 1 and "--max-lora-rank 32" in said[0]  # rank 20 is above vLLM's default
    written = [path for path in run.folder.exports.rglob("*") if path.suffix in (".json", ".md")]
    assert len(written) == 4
    for path in written:
        text = path.read_text()
        assert str(run.folder.path.parent) not in text and "smollm2-135m-instruct" not in text, path
