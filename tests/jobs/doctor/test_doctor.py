"""Each check is made to fail by what it looks for; none hangs, none tells a secret, nothing that it writes stays."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest

from jobs.config import RunConfig, load_config
from jobs.doctor import machine, places, services
from jobs.doctor.diagnosis import GROUPS, Group, diagnose
from jobs.doctor.finding import Finding
from jobs.run_folder import RunFolder
from jobs.stages.plan import RunPlan
from pipeline.promotion.registry import Registry
from pipeline.stream import StreamPlan
from pipeline.training.plan import TrainingPlan
from tests.jobs.test_cli import Run, mtl_lora
from tests.pipeline.promotion.conftest import adapter, add_version, promote, store, stored

__all__ = ["adapter", "mtl_lora", "store", "stored"]
SECRET = "s3cret-canary"


def config(folder: Path, *overrides: str) -> RunConfig:
    return load_config(Path("demo"), [f"run_root={folder}/runs", *overrides])


def said(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {each.what: each for each in findings}


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield listener.getsockname()[1]


class _Reader(BaseHTTPRequestHandler):
    """A tracking server whose clock is off, for a user who may only read."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() - 600, usegmt=True)

    def _answer(self, status: int, body: dict[str, object]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def do_HEAD(self) -> None:
        self._answer(200, {})

    def do_GET(self) -> None:
        if "experiments" in self.path:
            found = {"experiment_id": "1", "name": "mtl-lora", "lifecycle_stage": "active", "artifact_location": "x"}
            return self._answer(200, {"experiment": found})
        return self._answer(200, {})

    def do_POST(self) -> None:
        self._answer(403, {"error_code": "PERMISSION_DENIED", "message": "permission denied"})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Reader)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_versions_are_those_of_the_locks_and_others_are_named(tmp_path: Path) -> None:
    assert machine.python_version((3, 10)).status == "fail"
    assert machine.python_version().status == "ok"
    for lock in machine.LOCKS.glob("*.lock"):
        shutil.copy(lock, tmp_path)
    runtime = (tmp_path / "runtime.lock").read_text()
    (tmp_path / "runtime.lock").write_text(runtime.replace("accelerate==1.", "accelerate==7.") + "not-there==1.0\n")
    found = machine.package_versions(tmp_path)
    assert found.status == "fail"
    assert "accelerate 1." in found.found
    assert "not-there missing" in found.found
    assert machine.package_versions(tmp_path / "none").status == "warn"


@pytest.mark.parametrize("command", ["false", "no-such-compiler"])
def test_a_compiler_that_makes_no_program_is_named(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.c_compiler().status != "fail"
    monkeypatch.setenv("CC", command)
    found = machine.c_compiler()
    assert (found.status, command in found.found) == ("fail", True)


def test_what_the_machine_lacks_is_told(tmp_path: Path) -> None:
    run = config(tmp_path)
    many = run.model_copy(update={"training": run.training.model_copy(update={"num_workers": 10_000})})
    assert (
        machine.processors(run.model_copy(update={"ray": run.ray.model_copy(update={"address": "h:1"})})).status == "ok"
    )
    assert machine.processors(many).status == "fail"
    assert machine.memory(least=2**60).status == "warn"
    (tmp_path / "nvidia0").touch()
    import torch

    assert machine.gpu(tmp_path).status == ("ok" if torch.cuda.is_available() else "fail")
    huge = run.model_copy(update={"ray": run.ray.model_copy(update={"object_store_mb": 10**9})})
    assert machine.shared_memory(huge, tmp_path).status == "warn"
    assert machine.shared_memory(run, tmp_path / "none").status == "fail"


def test_a_port_that_is_taken_is_told(silent_port: int, closed_port: int) -> None:
    assert machine.port_is_free(silent_port, "a server").status == "warn"
    assert machine.port_is_free(closed_port, "a server").status == "ok"


def test_folders_are_tried_and_nothing_stays(tmp_path: Path) -> None:
    assert places.local_folder("run_root", tmp_path / "runs").status == "ok"
    assert list(tmp_path.iterdir()) == []
    assert places.local_folder("run_root", Path("/proc/1/runs")).status == "fail"
    assert places.readable("data.root", str(tmp_path)).status == "ok"
    missing = places.readable("data.root", str(tmp_path / "none"))
    assert (missing.status, "is not there" in missing.found) == ("fail", True)


def test_a_bucket_that_does_not_answer_or_is_no_bucket_is_told(
    closed_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert places.bucket("publish", "s3://bucket/ads").status == "fail"
    assert places.bucket("publish", "ftp://host/ads").status == "fail"


def test_the_plan_says_what_disk_is_needed(tmp_path: Path) -> None:
    run = config(tmp_path)
    assert places.disk(run).status in ("ok", "warn")
    stream = dict.fromkeys(set(StreamPlan.model_fields) - {"split", "schedule_sha256", "tasks"}, 1)
    epoch = StreamPlan(**stream, split="train", schedule_sha256="", tasks={})
    for kept, status in ((0, "ok"), (2**60, "fail")):
        needed = {name: each for name, each in TrainingPlan.model_fields.items() if each.is_required()}
        training = TrainingPlan(**dict.fromkeys(needed, 1) | {"kept_bytes": kept, "calibration": None})
        plan = RunPlan(steps=1, samples=1, test_samples={}, packed_rows=True, tokens={}, epoch=epoch, training=training)
        plan.write(RunFolder(run.folder).plan)
        assert places.disk(run).status == status


def test_a_clock_that_is_off_is_told(reader: str, closed_port: int, tmp_path: Path) -> None:
    found = said(places.clock(config(tmp_path, f"tracking.uri={reader}")))["clock"]
    assert (found.status, "600 s off" in found.found or "599 s off" in found.found) == ("fail", True)
    assert places.clock_against(f"http://127.0.0.1:{closed_port}").status == "warn"
    assert said(places.clock(config(tmp_path)))["clock"].status == "ok"


def test_who_may_only_read_is_told_and_who_does_not_answer(reader: str, closed_port: int, tmp_path: Path) -> None:
    found = said(services.registry(config(tmp_path, f"tracking.uri={reader}")))
    assert found["tracking"].status == "ok"
    assert (found["registry"].status, "right" in found["registry"].remedy) == ("fail", True)
    away = said(services.registry(config(tmp_path, f"tracking.uri=http://127.0.0.1:{closed_port}")))
    assert {name: each.status for name, each in away.items()} == {"tracking": "fail"}


@pytest.mark.slow
def test_a_champion_must_have_the_files_that_were_registered(store: str, adapter: Path, tmp_path: Path) -> None:
    registry = Registry("doctored", store)
    promote(registry, add_version(registry, adapter))
    run = config(tmp_path, f"tracking.uri={store}", "promotion.model_name=doctored")
    assert {name: each.status for name, each in said(services.registry(run)).items()} == dict.fromkeys(
        ("tracking", "registry", "champion"), "ok"
    )
    weights = next(Path(urlparse(registry.version(1).source).path).rglob("adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    found = said(services.registry(run))["champion"]
    assert (found.status, "was changed" in found.found) == ("fail", True)
    registry._client.set_registered_model_alias("doctored", "champion", str(add_version(registry, adapter)))
    assert "the ledger says" in said(services.registry(run))["champion"].found
    none = config(tmp_path, f"tracking.uri={store}", "promotion.model_name=never")
    assert said(services.registry(none))["champion"].status == "ok"
    assert not [m for m in registry._client.search_registered_models() if "doctor-" in m.name]
    assert not [tag for tag in registry._client.get_registered_model("doctored").tags if "doctor" in tag]


@pytest.mark.slow
def test_the_command_names_each_fault_exits_with_1_tells_no_secret_and_does_not_hang(
    mtl_lora: Run, silent_port: int, closed_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setitem(GROUPS, "registry", Group(services.registry, 8, "check it"))  # type: ignore[arg-type]
    for name in ("machine", "clock"):  # they have tests of their own
        monkeypatch.delitem(GROUPS, name)  # type: ignore[arg-type]
    address = f"http://user:{SECRET}@127.0.0.1:{silent_port}"
    places_and_cluster = (f"run_root={tmp_path}/runs", f"ray.address=http://127.0.0.1:{closed_port}")
    done = mtl_lora("doctor", "--json", f"tracking.uri={address}", *places_and_cluster)
    assert done.code == 1
    found = {each["what"]: each for each in json.loads(done.out)["findings"]}
    assert found["run_root"]["status"] == "ok"
    assert (found["registry"]["status"], "no answer within 8 s" in found["registry"]["found"]) == ("fail", True)
    assert found["Ray"]["status"] == "fail"
    assert all(each["remedy"] for each in found.values() if each["status"] != "ok")
    assert SECRET not in done.out
    assert SECRET not in done.err


def test_secrets_are_masked_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", SECRET)
    for text in (
        f"postgresql://host/db?user=u&password={SECRET[::-1]}",
        f"https://h/x?sig={SECRET[::-1]}&a=1",
        f"http://u:{SECRET[::-1]}@h",
        f"as {SECRET} stands",
    ):
        plain = Finding("x", text).without_secrets().found
        assert SECRET not in plain
        assert SECRET[::-1] not in plain


@pytest.mark.slow
def test_a_machine_that_is_well_passes_and_its_cluster_ends(tmp_path: Path) -> None:
    found = {each.what: each for each in diagnose(config(tmp_path), {"cluster": GROUPS["cluster"]})}
    assert (found["Ray"].status, "a local cluster starts and ends" in found["Ray"].found) == ("ok", True)
