from __future__ import annotations

import ast
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import apprise
import pytest

from jobs.config import load_config
from jobs.doctor.machine import notices
from jobs.notices import NoticesConfig, notify, targets
from jobs.weekly.loop import NOTICES, _failures_noticed
from tests.jobs.test_cli import ROWS, _configuration


class Hook(HTTPServer):
    """A webhook that refuses its first calls, or sends all of them elsewhere."""

    def __init__(self, refusals: int, status: int = 503, location: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refusals, self.status, self.location = refusals, status, location
        self.calls, self.taken = 0, []  # type: ignore[var-annotated]

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    @contextmanager
    def listening(self) -> Iterator[Hook]:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        yield self
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls += 1
        refused = self.server.calls <= self.server.refusals
        if not refused:
            self.server.taken.append(json.loads(body))
        self.send_response(self.server.status if refused else 200)
        if refused and self.server.location:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hook(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    with Hook(request.param).listening() as server:
        monkeypatch.setenv("MTL_LORA_WEBHOOK", f"http://{server.place}/secret-token")
        yield server


@pytest.mark.parametrize("hook", [1], indirect=True)
def test_a_notice_is_tried_again_and_carries_reasons_and_links(hook: Hook, tmp_path: Path) -> None:
    log = tmp_path / "notices.jsonl"
    assert notify(
        NoticesConfig(attempts=3), log, "HOLD", ["task spam fell"], model="ads", report="report.html", version=None
    )
    assert hook.calls == 2
    (taken,) = hook.taken
    assert taken["event"] == "HOLD"
    assert taken["reasons"] == ["task spam fell"]
    assert taken["report"] == "report.html"
    assert "version" not in taken
    assert json.loads(log.read_text())["delivered"] is True


@pytest.mark.parametrize("hook", [9], indirect=True)
def test_a_dead_webhook_fails_nothing_and_its_url_stays_secret(
    hook: Hook, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "notices.jsonl"
    assert not notify(NoticesConfig(attempts=2), log, "FAILED", ["boom"], model="ads")
    assert hook.calls == 2
    assert json.loads(log.read_text())["delivered"] is False
    assert "secret-token" not in capfd.readouterr().err + log.read_text()


def test_without_a_webhook_notices_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTL_LORA_WEBHOOK", raising=False)
    for event in ("PROMOTE", "MISSED"):
        assert notify(NoticesConfig(), tmp_path / "n.jsonl", event, ["x"], model="ads")  # type: ignore[arg-type]
    assert [json.loads(line)["event"] for line in (tmp_path / "n.jsonl").read_text().splitlines()] == [
        "PROMOTE",
        "MISSED",
    ]


@pytest.mark.parametrize("hook", [0], indirect=True)
def test_a_password_in_an_error_is_neither_said_nor_logged_nor_sent(
    hook: Hook, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = load_config(_configuration(tmp_path, ROWS))
    with pytest.raises(ConnectionError), _failures_noticed(config):
        raise ConnectionError("API request to http://ads:hunter2@host/api/2.0 failed")
    (taken,) = hook.taken
    assert taken["reasons"] == ["ConnectionError: API request to http://ads:***@host/api/2.0 failed"]
    assert "hunter2" not in json.dumps(taken) + (config.run_root / NOTICES).read_text() + capfd.readouterr().err


@pytest.mark.parametrize("stop", [SystemExit(143), KeyboardInterrupt()])
def test_a_stop_that_was_asked_for_is_no_failure(tmp_path: Path, stop: BaseException) -> None:
    config = load_config(_configuration(tmp_path, ROWS))
    with pytest.raises(type(stop)), _failures_noticed(config):
        raise stop
    assert not (config.run_root / NOTICES).exists()


CANARY = "T0CANARY"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("scheme", ["http", "json", "xml", "form", "ntfy", "mmost", "json+yes"])
def test_a_redirect_hands_the_notice_to_nobody(
    scheme: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hook(0).listening() as thief, Hook(9, status, f"http://{thief.place}/").listening() as hook:
        asked, _, wish = scheme.partition("+")
        url = f"{asked}://{hook.place}/{'a' * 26}{'?redirect=yes' if wish else ''}"
        monkeypatch.setenv("MTL_LORA_WEBHOOK", url)
        assert not notify(NoticesConfig(attempts=1), tmp_path / "n.jsonl", "HOLD", ["task spam fell"], model="ads")
        assert hook.calls >= 1
        assert thief.calls == 0


def test_every_request_of_every_service_can_be_kept_from_redirects() -> None:
    """What the tests above hold of six services on this machine, the others' sources say."""
    calls = []
    for path in sorted((Path(apprise.__file__).parent / "plugins").rglob("*.py")):
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        assert not {"httpx", "aiohttp", "urllib.request", "http.client"} & {*_imported(nodes)}, path
        for node in nodes:
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] == "requests":
                if ast.unparse(node.func).split(".")[1] in ("get", "post", "put", "patch", "delete", "request"):
                    calls.append({each.arg: ast.unparse(each.value) for each in node.keywords} | {"path": path})
                else:
                    assert "Session" not in ast.unparse(node.func), path
    assert len(calls) > 150
    assert [each["path"] for each in calls if each.get("allow_redirects") not in ("self.redirects", "False")] == []


def _imported(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_several_targets_are_each_tried_until_they_took_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hook(0).listening() as first, Hook(1).listening() as second, Hook(9).listening() as dead:
        value = f"http://{first.place}/a, json://{second.place}/b\nhttp://{dead.place}/{CANARY}"
        monkeypatch.setenv("MTL_LORA_WEBHOOK", value)
        assert not notify(NoticesConfig(attempts=2), tmp_path / "n.jsonl", "HOLD", ["task spam fell"], model="ads")
    assert [each.calls for each in (first, second, dead)] == [1, 2, 2]
    assert first.taken[0]["text"] == "ads: HOLD. task spam fell"
    assert second.taken[0]["title"] == "ads: HOLD"
    assert "task spam fell" in second.taken[0]["message"]
    assert json.loads((tmp_path / "n.jsonl").read_text())["delivered"] is False


@pytest.mark.parametrize(
    "url",
    [
        CANARY,
        f"https://:{CANARY}",
        f"slack://{CANARY}",
        f"nosuch://{CANARY}/x",
        f"slack://{CANARY}A1/B{CANARY}/c{CANARY}",
        f"https://127.0.0.1:9/{CANARY}",
        f"json://user:{CANARY}@127.0.0.1:9/{CANARY}",
        f"mailto://user:{CANARY}@127.0.0.1:9?to={CANARY}@x.example",
    ],
)
def test_a_target_is_never_told(
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("MTL_LORA_WEBHOOK", url)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing leaves this machine
    config = load_config(_configuration(tmp_path, ROWS))
    assert not notify(NoticesConfig(attempts=1), tmp_path / "n.jsonl", "HOLD", ["x"], model="ads")
    looked = notices(config.notices)
    logged = (tmp_path / "n.jsonl").read_text() + caplog.text + str(caplog.messages)
    assert CANARY not in "".join([str(looked), logged, config.as_yaml(), *capfd.readouterr()])


def test_the_doctor_says_which_targets_are_none_and_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Hook(0).listening() as hook:
        monkeypatch.setenv("MTL_LORA_WEBHOOK", f"http://{hook.place}/a json://{hook.place}/b")
        assert (notices(NoticesConfig()).status, notices(NoticesConfig()).found) == (
            "ok",
            "target 1 (http), target 2 (json)",
        )
        monkeypatch.setenv("MTL_LORA_WEBHOOK", f"http://{hook.place}/a,slack://b")
        found = notices(NoticesConfig())
        assert found.status == "warn"
        assert "number 2 is something else (slack;" in found.found
        assert notify(NoticesConfig(attempts=1), Path("/dev/null"), "HOLD", ["x"]) is False
        assert hook.calls == 1  # what is right of the variable still works
    monkeypatch.delenv("MTL_LORA_WEBHOOK")
    assert "is not set" in notices(NoticesConfig()).found
    assert targets(NoticesConfig()) == ({}, [])
