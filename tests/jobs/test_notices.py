from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.config import load_config
from jobs.notices import NoticesConfig, notify
from jobs.weekly.loop import NOTICES, _failures_noticed
from tests.jobs.test_cli import ROWS, _configuration


class Hook(HTTPServer):
    """A webhook that refuses its first calls."""

    def __init__(self, refusals: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refusals, self.calls, self.taken = refusals, 0, []  # type: ignore[var-annotated]


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls += 1
        refused = self.server.calls <= self.server.refusals
        if not refused:
            self.server.taken.append(body)
        self.send_response(503 if refused else 200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hook(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    server = Hook(request.param)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("MTL_LORA_WEBHOOK", f"http://127.0.0.1:{server.server_port}/secret-token")
    yield server
    server.shutdown()
    server.server_close()


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
