"""A base model from afar: pinned, safetensors alone, fetched once a machine; the hub's real client asks a local hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.errors import InputError
from pipeline.modeling.base_model import BaseModelConfig, resolve_base
from tests.pipeline.hub_server import COMMIT, OTHER_COMMIT, REPO, HubServer
from tests.pipeline.modeling.tiny import tiny_folder

_RESOLVE = """
import sys
from pipeline.errors import InputError
from pipeline.modeling.base_files import fetched_base
from pipeline.modeling.config import BaseModelConfig
try:
    print(fetched_base(BaseModelConfig(base=sys.argv[1], revision=sys.argv[2])))
except InputError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "llama")


def _environment(tmp_path: Path, url: str, offline: bool = False) -> dict[str, str]:
    return {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "MTL_LORA_CACHE": str(tmp_path / "cache"),
    }


def _resolved(tmp_path: Path, url: str, revision: str, repo: str = REPO, offline: bool = False) -> str:
    """Ask in a process of its own: the client reads its environment once."""
    done = subprocess.run(
        [sys.executable, "-c", _RESOLVE, repo, revision],
        env=_environment(tmp_path, url, offline),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_hub_model_is_fetched_once_and_then_needs_no_network(tmp_path: Path, model: Path) -> None:
    source = shutil.copytree(model, tmp_path / "source")
    (source / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    with HubServer(source) as hub:
        folder = Path(_resolved(tmp_path, hub.url, "v1"))
        fetched = hub.requests.total()
        assert Path(_resolved(tmp_path, hub.url, "v1")) == folder
        assert hub.requests.total() == fetched
    assert folder.name == COMMIT
    for path in model.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(folder.glob("*.py")) and not list(folder.glob("*.bin"))
    assert Path(_resolved(tmp_path, "http://127.0.0.1:9", "v1", offline=True)) == folder
    (note,) = (tmp_path / "cache" / "bases").glob("*.json")
    known = json.loads(note.read_text())
    assert (known["commit"], known["revision"]) == (COMMIT, "v1")
    assert known["sha256"].keys() == {path.name for path in model.iterdir() if path.name != ".gitattributes"}


def test_two_processes_at_once_fetch_a_hub_model_once(tmp_path: Path, model: Path) -> None:
    with HubServer(model) as hub:
        command = [sys.executable, "-c", _RESOLVE, REPO, COMMIT]
        both = [
            subprocess.Popen(command, env=_environment(tmp_path, hub.url), stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        folders = {process.communicate(timeout=120)[0].splitlines()[-1] for process in both}
        assert len(folders) == 1 and hub.requests["tree"] <= 2  # one listing of ours, one of the client's
        assert hub.requests["refs"] == 0


def test_revisions_that_pin_nothing_and_models_without_safetensors_are_refused(tmp_path: Path, model: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(model / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    with HubServer(model) as hub:
        assert OTHER_COMMIT in _resolved(tmp_path, hub.url, "main")
        assert "did you mean 'v1'" in _resolved(tmp_path, hub.url, "v11")
        assert "is none; fix the name" in _resolved(tmp_path, hub.url, COMMIT, repo="org/other")
    with HubServer(pickled) as hub:
        assert "pytorch_model.bin" in _resolved(tmp_path, hub.url, COMMIT)
    assert "HF_HUB_OFFLINE is set" in _resolved(tmp_path, "http://127.0.0.1:9", COMMIT, offline=True)


def test_a_hub_id_without_a_revision_is_told_to_pin_one() -> None:
    with pytest.raises(InputError, match=r"say model\.revision too, its commit"):
        resolve_base(BaseModelConfig(base="org/name"))


@pytest.mark.parametrize("base", ["/models/llama", "s3://bucket/llama", "llama"])
def test_a_revision_is_that_of_a_hub_model_alone(base: str) -> None:
    with pytest.raises(ValidationError, match=r"leave model\.revision out"):
        BaseModelConfig(base=base, revision=COMMIT)


def test_no_revision_leaves_no_trace_in_what_earlier_runs_wrote() -> None:
    assert "revision" not in BaseModelConfig().model_dump(mode="json")
