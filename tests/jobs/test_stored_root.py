"""Runs whose root is a URL: their configuration, what one machine leaves for another, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.config import RunConfig, load_config
from jobs.run import Run, root_file
from jobs.study_config import StudyConfig
from jobs.tuning.trials import Search
from jobs.weekly.schedule import schedule
from pipeline.errors import InputError
from pipeline.mirror import SharedFolder
from tests.pipeline.s3_server import BUCKET, S3Server

ROOT = f"s3://{BUCKET}/runs"
TRACKING = ("tracking.uri=http://mlflow:5000",)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "one"))
    return tmp_path


def _config(folder: Path, *overrides: str, root: str = ROOT) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"name": "first", "run_root": root}))
    return load_config(path, [*TRACKING, *overrides])


def test_a_root_in_a_bucket_keeps_its_url_wherever_the_working_copy_lies(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(machine, f"training.warm_start={ROOT}/champions/3")
    assert config.store == f"{ROOT}/first"
    assert config.manifest_path == f"{ROOT}/first/shards/manifest.json"
    assert config.folder.is_relative_to(machine / "one")
    assert config.training.warm_start == config.run_root / "champions" / "3"
    (machine / "written.yaml").write_text(config.as_yaml())
    assert str(machine) not in config.as_yaml()
    monkeypatch.setenv("MTL_LORA_CACHE", str(machine / "two"))
    other = load_config(machine / "written.yaml", TRACKING)
    assert other.folder.is_relative_to(machine / "two")
    assert (other.store, other.digest(), other.shown()) == (config.store, config.digest(), config.shown())


def test_a_root_on_a_disk_has_no_url(machine: Path) -> None:
    config = _config(machine, root=str(machine / "runs"))
    assert config.store is None
    assert config.folder == machine / "runs" / "first"
    assert str(machine / "runs") in config.as_yaml()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("tracking.uri=''",), "need an MLflow that all nodes reach, tracking.uri is not set; set tracking.uri"),
        (("training.warm_start=s3://other/adapter",), "must be a folder under run_root"),
        (("run_root=https://host/runs",), "can only be read"),
    ],
)
def test_what_no_machine_could_share_is_refused(machine: Path, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        _config(machine, *overrides)


def test_verbs_that_need_a_disk_say_so(machine: Path) -> None:
    space = {"space": {"training.learning_rate": {"log_uniform": [1e-4, 1e-2]}}}
    with pytest.raises(InputError, match="tune keeps its trials on a disk that all nodes share, got run_root 's3:"):
        _ = Search(_config(machine, f"tune={space}")).tune
    tasks = "tasks={asked: {template: '{text}', label_words: [' no', ' yes']}}"
    daily = _config(machine, "retraining={}", "data.source=records", f"data.root={machine}", tasks)
    with pytest.raises(InputError, match="schedule keeps its times in a database on a disk"):
        schedule(daily)
    with pytest.raises(ValueError, match="run_root of a study must be a folder on a disk"):
        StudyConfig.model_validate({"name": "study", "run_root": ROOT})


def test_a_file_of_the_root_and_a_folder_of_any_run_are_found_on_another_machine(
    machine: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Run(_config(machine))
    with root_file(one.config, "notices.jsonl") as log:
        log.parent.mkdir(parents=True)
        log.write_text("first\n")
    champion = one.config.run_root / "champions" / "3"
    champion.mkdir(parents=True)
    (champion / "adapter.safetensors").write_bytes(b"tensors")
    (one.config.folder / "export").mkdir(parents=True)
    (one.config.folder / "export" / "task.json").write_text("{}")
    found = [one.shared(champion), one.shared(one.config.folder / "export")]
    assert one.shared(machine) == machine

    monkeypatch.setenv("MTL_LORA_CACHE", str(machine / "two"))
    there = [folder.here() for folder in found if isinstance(folder, SharedFolder)]
    assert [path.is_relative_to(machine / "two") for path in there] == [True, True]
    assert (there[0] / "adapter.safetensors").read_bytes() == b"tensors"
    assert (there[1] / "task.json").read_text() == "{}"
    other = Run(_config(machine, f"training.warm_start={ROOT}/champions/3"))
    with root_file(other.config, "notices.jsonl") as log:
        assert log.read_text() == "first\n"
        log.write_text("first\nsecond\n")
    assert other.fetch(other.config.folder / "export" / "task.json").is_file()
    assert not other.fetch(other.config.folder / "result.json").exists()
    assert (other.folder.exports / "task.json").is_file()
    assert (other.config.run_root / "champions" / "3" / "adapter.safetensors").is_file()
    with root_file(one.config, "notices.jsonl") as log:
        assert log.read_text() == "first\nsecond\n"
