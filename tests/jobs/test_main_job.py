"""The main job on a real Ray cluster with two DeepSpeed ranks, a real MLflow registry and the real base model, cut."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from jobs.config import RunConfig, load_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LEDGER = "training.ledger=true"
CANARY = "hunter2canary"
SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": f"mlflow{CANARY}",
    "AWS_SECRET_ACCESS_KEY": f"aws{CANARY}",
    "MTL_LORA_SERVE_TOKEN": f"serve{CANARY}",
    "MTL_LORA_WEBHOOK": f"http://127.0.0.1:9/{CANARY}?token={CANARY}",
}
FOREIGN = re.compile(
    r"\.(py|cc):\d+|\b(INFO|WARNING|ERROR|DEBUG)\b[ \t:]|\b(pid|ip)=|raylet|mlflow\.[a-z_]+[.:]|alembic|deepspeed|"
    r"\b(Future|User|Deprecation|Runtime|Resource)Warning\b|warnings\.warn|^\d{4}[-/]\d\d[-/]\d\d[ T]"
)
"""What lines of Ray, MLflow, DeepSpeed, torch and Python's warnings look like."""
WITHIN = 0.06
"""How near each task of the demo comes to the best that any model can reach on its test samples."""


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1500, env=os.environ | SECRETS)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, str]:
    overrides = [f"run_root={tmp_path_factory.mktemp('runs')}", "name=whole", "notices.attempts=1", LEDGER]
    done = _run("demo", "--json", *overrides)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert json.loads(done.stdout)["verdict"] == "PROMOTE"
    assert CANARY not in done.stdout + done.stderr
    return load_config(Path("demo"), overrides), done.stderr


@pytest.fixture(scope="module")
def run(demo: tuple[RunConfig, str]) -> RunConfig:
    return demo[0]


def test_each_task_of_the_demo_comes_near_the_best_attainable(run: RunConfig) -> None:
    found = json.loads((run.folder / "evaluation.json").read_text())["tasks"]
    below = {name: round(task["best_attainable"] - task["value"], 3) for name, task in found.items()}
    assert max(below.values()) <= WITHIN, below


def test_the_demo_shows_no_line_of_a_library(demo: tuple[RunConfig, str]) -> None:
    config, told = demo
    log = (config.folder / "job.log").read_text()
    assert any(map(FOREIGN.search, log.splitlines()))  # they are kept there
    place = re.escape(str(config.run_root))
    assert [line for line in told.splitlines() if FOREIGN.search(re.sub(place, "", line))] == []


def test_the_demo_ends_with_commands_that_are_there(demo: tuple[RunConfig, str]) -> None:
    config, told = demo
    ending = told[told.index("what to do next") :].splitlines()[1:]
    commands = [re.split(r"  +", line.strip())[1].split() for line in ending]
    verbs = [command[1] for command in commands if command[0].endswith("mtl-lora")]
    assert verbs == ["compare", "lineage", "init"]
    assert Path(commands[0][1]) == config.folder / "report.html"
    done = _run(*next(command[1:] for command in commands if "lineage" in command))
    assert done.returncode == 0, done.stderr[-2000:]


def test_run_folder_holds_what_is_promised(run: RunConfig) -> None:
    for name in ("config.yaml", "plan.json", "evaluation.json", "decision.json", "report.html", "samples.jsonl"):
        assert (run.folder / name).is_file(), name
    for task in run.tasks:
        assert (run.folder / "export" / task.name / "adapter_model.safetensors").is_file()
    report = json.loads((run.folder / "evaluation.json").read_text())
    assert report["schema"] == 1
    assert set(report["tasks"]) == {task.name for task in run.tasks}
    assert all(result["best_attainable"] is not None for result in report["tasks"].values())


def _holding(folder: Path, text: str) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()}


def test_no_file_of_a_whole_run_holds_a_secret_of_its_environment(run: RunConfig) -> None:
    assert _holding(run.run_root, "ads-relevance") >= {"config.yaml", "mlflow.db", "job.log"}  # they are looked into
    assert _holding(run.run_root, CANARY) == set()


def _pickles(folder: Path) -> list[str]:
    """Names of files that are a pickle, of protocol 2 on as all writers of weights have it, or a zip with one in it."""

    def is_pickle(path: Path) -> bool:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as members:
                return any(re.match(b"\x80[\x02-\x05]", members.read(name)[:2]) for name in members.namelist())
        with path.open("rb") as file:
            return re.match(b"\x80[\x02-\x05]", file.read(2)) is not None

    return [path.name for path in folder.rglob("*") if path.is_file() and is_pickle(path)]


def test_no_file_that_a_run_publishes_is_a_pickle(run: RunConfig, tmp_path: Path) -> None:
    import mlflow

    (tmp_path / "planted").mkdir()
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "planted" / f"{protocol}.bin").write_bytes(pickle.dumps([], protocol))
    torch.save({}, tmp_path / "planted" / "weights.bin")
    assert len(_pickles(tmp_path / "planted")) == pickle.HIGHEST_PROTOCOL
    client = mlflow.MlflowClient(run.tracking.uri)
    version = client.get_model_version_by_alias("ads-relevance", "champion")
    source = client.get_model_version_download_uri(version.name, version.version)
    (tmp_path / "registered").mkdir()
    registered = mlflow.artifacts.download_artifacts(
        source, dst_path=tmp_path / "registered", tracking_uri=client.tracking_uri
    )
    for folder in (run.folder / "adapter", run.folder / "export", Path(registered)):
        assert [*folder.rglob("*.safetensors")], folder
        assert _pickles(folder) == []


def test_ledger_is_the_global_order(run: RunConfig) -> None:
    from pipeline.stream import MixedStream

    rows = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    batch = run.training.global_batch_size
    stream = MixedStream(run.manifest_path, run.seed, batch, run.mixture, length_grouping=run.length_grouping)
    for step in (0, 1, 63, 64, 329):
        assert [f"{r['task']}/{r['key']}" for r in rows if r["step"] == step] == stream.global_batch(step)


def test_checkpoint_holds_adapter_and_optimizer_only(run: RunConfig) -> None:
    newest = max((run.folder / "checkpoints").glob("step-*"))
    trained = sum(tensor.numel() for tensor in load_file(newest / "adapter" / "adapter_model.safetensors").values())
    whole = sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())
    assert whole < 18 * trained  # weights twice and two moments, 4 bytes each; the base alone is 100 times as large


def test_champion_answers_mixed_tasks_from_anywhere(run: RunConfig, tmp_path: Path) -> None:
    code = (
        "import sys, mlflow, pandas as pd; mlflow.set_tracking_uri(sys.argv[1]);"
        "model = mlflow.pyfunc.load_model('models:/ads-relevance@champion');"
        "rows = pd.DataFrame([{'task': 'query_vertical', 'query': 'red sofa sale'},"
        "{'task': 'query_keyword_relevance', 'query': 'sofa', 'keyword': 'red sofa'}]);"
        "print(model.predict(rows).to_json())"
    )
    command = [sys.executable, "-c", code, run.tracking.uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = pd.DataFrame(json.loads(done.stdout.splitlines()[-1]))
    assert list(answer["task"]) == ["query_vertical", "query_keyword_relevance"]
    assert answer["score"].between(0, 1).all()


def test_champion_s_logged_model_shows_data_metrics_and_version(run: RunConfig) -> None:
    from mlflow import MlflowClient

    client, report = MlflowClient(run.tracking.uri), json.loads((run.folder / "evaluation.json").read_text())
    version = client.get_model_version_by_alias("ads-relevance", "champion")
    model, made = client.get_logged_model(version.tags["model_id"]), client.get_run(version.run_id)
    digest = version.tags["manifest_sha256"][:36]
    inputs = {(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in made.inputs.dataset_inputs}
    assert inputs == {("train", digest, "training"), ("test", digest, "evaluation")}
    named = {m.key: (m.value, m.dataset_name, m.dataset_digest) for m in model.metrics}
    wanted = {f"test/{name}/{result['metric']}": result["value"] for name, result in report["tasks"].items()}
    wanted["test/macro"] = report["macro"]["value"]
    assert named == {key: (value, "test", digest) for key, value in wanted.items() if value is not None}
    assert model.params == made.data.params
    assert [one.model_id for one in made.outputs.model_outputs] == [model.model_id]
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "ads-relevance", "version": version.version}]


def test_exported_task_answers_as_the_multi_task_model(run: RunConfig) -> None:
    from peft import PeftModel

    from pipeline.modeling.adapter import load_adapter
    from pipeline.modeling.base_model import load_base

    exact = run.model.model_copy(update={"dtype": "float32"})
    adapted = load_adapter(load_base(exact), run.folder / "adapter").eval()
    ids = torch.randint(0, 1000, (2, 12), generator=torch.Generator().manual_seed(0))
    for index, task in enumerate(run.tasks):
        exported = PeftModel.from_pretrained(load_base(exact), run.folder / "export" / task.name).eval()
        with torch.no_grad():
            expected = adapted(ids, task_ids=torch.full((2,), index)).logits
            torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_second_run_of_a_finished_folder_changes_nothing(run: RunConfig) -> None:
    before = (run.folder / "adapter" / "adapter_model.safetensors").read_bytes()
    done = _run("demo", f"run_root={run.run_root}", "name=whole", "notices.attempts=1", LEDGER)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is champion already" in done.stderr
    assert (run.folder / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_folder_of_another_configuration_is_refused(run: RunConfig) -> None:
    done = _run("train", "--config", "demo", f"run_root={run.run_root}", "name=whole", LEDGER, "seed=5")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "was trained with another" in done.stderr
