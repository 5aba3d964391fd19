"""What a web server does not do, or fails at for a while, is told apart, and never taken for an absent file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare
from pipeline.retry import persistently
from pipeline.storage import check_location, exists, filesystem, stamp_of
from tests.pipeline.https_server import HttpsServer
from tests.pipeline.stores import web

TASK = TaskSpec(name="t", template="{text}:", label_words=(" no", " yes"))
ROWS = [{"text": f"text {i} {'x' * 100}", "label": i % 2} for i in range(200)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with web(tmp_path / "files", monkeypatch) as store:
        (store.folder / "t").mkdir()
        (store.folder / "t" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        yield store.server


def prepared(server: HttpsServer, tmp_path: Path, **more: Any) -> int:
    config = DataConfig(source="records", root=server.url, files={"t": {"train": "t/train.jsonl"}}, **more)
    return sum(shard.samples for shard in prepare(config, [TASK], tmp_path / "out", seed=0).shards)


@pytest.mark.parametrize("failures", [[503], [503, 429, 500], [0], [0, 0, 503]])
def test_a_server_that_fails_for_a_while_is_asked_again(
    server: HttpsServer, tmp_path: Path, failures: list[int]
) -> None:
    server.failures = list(failures)
    assert prepared(server, tmp_path) == 200
    assert not server.failures


def test_a_failing_server_is_no_absent_file(server: HttpsServer) -> None:
    fs, path = filesystem(f"{server.url}/t/train.jsonl")
    server.failures = [503]
    with pytest.raises(Exception, match="503") as caught:
        exists(fs, path)
    assert not isinstance(caught.value, FileNotFoundError)
    assert exists(fs, path)
    assert not exists(fs, f"{path}.gz")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_said_at_once(server: HttpsServer, tmp_path: Path, status: int) -> None:
    server.failures = [status] * 9
    start = time.monotonic()
    with pytest.raises(InputError, match=r"must be readable with the credentials at hand.*netrc"):
        prepared(server, tmp_path)
    assert time.monotonic() - start < 5


def test_a_certificate_that_is_not_trusted_is_said_at_once(server: HttpsServer) -> None:
    fs, path = filesystem(f"{server.url.replace('localhost', '127.0.0.1')}/t/train.jsonl")
    start = time.monotonic()
    with pytest.raises(InputError, match="certificate"):
        persistently(lambda: fs.info(path), path)
    assert time.monotonic() - start < 5


def test_a_server_without_head_is_read(server: HttpsServer, tmp_path: Path) -> None:
    server.answers_head = False
    assert prepared(server, tmp_path) == 200


@pytest.mark.parametrize(
    ("without", "message"),
    [("answers_ranges", "must answer for ranges of bytes"), ("tells_size", "must tell the size")],
)
def test_a_server_that_sends_whole_files_alone_is_refused(
    server: HttpsServer, tmp_path: Path, without: str, message: str
) -> None:
    setattr(server, without, False)
    with pytest.raises(InputError, match=message):
        prepared(server, tmp_path)


def test_an_empty_file_is_empty(server: HttpsServer) -> None:
    (server.folder / "empty.jsonl").write_text("")
    fs, path = filesystem(f"{server.url}/empty.jsonl")
    with fs.open(path, "rb") as file:
        assert file.read() == b""


def test_a_pattern_needs_a_list_of_files(server: HttpsServer, tmp_path: Path) -> None:
    config = DataConfig(source="records", root=server.url, files={"t": {"train": "t/*.jsonl"}})
    with pytest.raises(InputError, match="no list of the files in a folder"):
        prepare(config, [TASK], tmp_path / "out", seed=0)


@pytest.mark.parametrize(
    "location", ["https://me:secret@host/a.csv", "https://host/a.csv?token=secret", "https://host/a#b"]
)
def test_an_address_with_secrets_is_refused_without_showing_them(location: str) -> None:
    with pytest.raises(InputError, match="an address alone") as caught:
        check_location(location)
    assert "secret" not in str(caught.value)


def test_a_version_is_the_etag_else_the_time_and_the_size(server: HttpsServer) -> None:
    fs, path = filesystem(f"{server.url}/t/train.jsonl")
    file = server.folder / "t" / "train.jsonl"

    def stamps() -> tuple[str, str]:
        found = []
        for server.tells_etag in (True, False):
            found.append(stamp_of(fs.info(path)))
        return found[0], found[1]

    before, times = stamps(), file.stat()
    assert stamps() == before
    file.write_text(file.read_text() + "{}\n")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not set(stamps()) & set(before)
