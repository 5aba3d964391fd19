"""The configuration explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from jobs.config import load_config
from jobs.config_file import PACKAGED
from jobs.config_views import as_yaml, explained, schema, sizes


def test_each_value_says_where_it_came_from(tmp_path: Path) -> None:
    rows = explained(Path("demo"), [f"run_root={tmp_path}", "training.max_steps=7"])
    assert rows["training.max_steps"] == {"value": 7, "from": "override"}
    assert rows["name"] == {"value": "demo", "from": "file"}
    assert rows["adapter.method"] == {"value": "mtl_lora", "from": "default"}
    assert rows["tracking.uri"]["from"] == "resolved"


def test_what_is_shown_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    path.write_text(as_yaml(explained(Path("ads_real"), [f"run_root={tmp_path}"])))
    assert load_config(path) == load_config(Path("ads_real"), [f"run_root={tmp_path}"])


def test_a_password_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ads:hunter2@db/mlflow")
    assert "hunter2" not in as_yaml(explained(Path("demo"), [f"run_root={tmp_path}"]))


@pytest.mark.parametrize("name", sorted(path.name for path in PACKAGED.glob("*.yaml")))
def test_packaged_configurations_hold_to_the_schema(name: str) -> None:
    found = schema()
    jsonschema.Draft202012Validator.check_schema(found)
    jsonschema.validate(yaml.safe_load((PACKAGED / name).read_text()), found)


def test_the_schema_refuses_a_typo() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "x", "trainin": {}}, schema())


def _undescribed(found: Any, place: str) -> list[str]:
    missing = []
    for key, value in found.get("properties", {}).items():
        if "description" not in value:
            missing.append(f"{place}.{key}")
    return missing


def test_every_key_has_its_description() -> None:
    found = schema()
    missing = _undescribed(found, "run")
    for name, each in found["$defs"].items():
        missing += _undescribed(each, name)
    assert missing == []
    assert json.dumps(found)


def test_the_counts_of_a_size_go_to_people_and_the_solved_rank_into_json(tmp_path: Path) -> None:
    targets = "adapter.target_modules=[q_proj, k_proj, v_proj, o_proj]"
    overrides = [f"run_root={tmp_path}", "model.num_layers=1", "adapter.size={like: lora, r: 16}", targets]
    found = sizes(Path("demo"), overrides)
    assert found is not None and found.parameters == 61440
    command = ["config", "show", "--config", "demo", *overrides]
    shown = CliRunner().invoke(app, [*command, "--json"])
    rows = json.loads(shown.stdout)
    assert rows["adapter.r"] == {"value": found.trained.r, "from": "size"}
    assert rows["adapter.size.like"] == {"value": "lora", "from": "override"}
    path = tmp_path / "shown.yaml"
    path.write_text(CliRunner().invoke(app, command).stdout)
    assert load_config(path) == load_config(Path("demo"), overrides)
