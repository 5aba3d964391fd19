"""A local stand-in for the Hugging Face Hub: it speaks what ``huggingface_hub`` asks to fetch a model or read files."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from tests.pipeline.local_server import LocalServer

REPO, COMMIT, OTHER_COMMIT = "org/tiny", "a" * 40, "b" * 40
"""The one model, the commit of its tag ``v1``, and where its branch ``main`` is."""


class HubServer(LocalServer):
    """Serves a folder as the model and the data set ``org/tiny``; a context manager. ``requests`` counts what was asked
    for, by kind of path."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        path = unquote(urlparse(request.path).path).replace(
            "/datasets/", "/models/" if "/api/" in request.path else "/"
        )
        kind = next((k for k in ("/refs", "/tree/", "/revision/", "/resolve/") if k in path), path)
        self.requests[kind.strip("/")] += 1
        if path == f"/api/models/{REPO}/refs":
            tag = {"name": "v1", "ref": "refs/tags/v1", "targetCommit": COMMIT}
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": OTHER_COMMIT}
            return _json(request, {"tags": [tag], "branches": [branch], "converts": []}, with_body)
        if path.startswith(f"/api/models/{REPO}/tree/{COMMIT}"):
            return self._tree(request, path.partition(f"/tree/{COMMIT}")[2].strip("/"), with_body)
        if path == f"/api/models/{REPO}/paths-info/{COMMIT}":
            form = parse_qs(request.rfile.read(int(request.headers["Content-Length"])).decode())
            asked = [self.folder / name for name in form["paths"]]
            return _json(request, [self._entry(place) for place in asked if place.exists()], with_body)
        if path.startswith(f"/api/models/{REPO}/revision/"):
            return _json(request, {"id": REPO, "sha": COMMIT, "siblings": []}, with_body)
        head = f"/{REPO}/resolve/{COMMIT}/"
        file = self.folder / path.removeprefix(head)
        if not (path.startswith(head) and file.is_file()):
            code = "RevisionNotFound" if path.startswith(f"/api/models/{REPO}/") else "RepoNotFound"
            return _send(request, 404, b"", {"X-Error-Code": code}, with_body)
        data = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if with_body and (limits := request.headers.get("Range")):
            first, _, last = limits.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return _send(request, 206, data[start : end + 1], headers, with_body)
        return _send(request, 200, data, headers, with_body)

    def _tree(self, request: BaseHTTPRequestHandler, under: str, with_body: bool) -> None:
        place = self.folder / under
        if not place.is_dir():
            return _send(request, 404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
        recursive = parse_qs(urlparse(request.path).query).get("recursive", ["false"])[0].lower() == "true"
        entries = sorted(place.rglob("*") if recursive else place.iterdir())
        return _json(request, [self._entry(entry) for entry in entries], with_body)

    def _entry(self, file: Path) -> dict[str, Any]:
        name = file.relative_to(self.folder).as_posix()
        if file.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        data = file.read_bytes()
        entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry


def _json(request: BaseHTTPRequestHandler, value: Any, with_body: bool) -> None:
    _send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"}, with_body)


def _send(request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
    request.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(data))}.items():
        request.send_header(name, value)
    request.end_headers()
    if with_body:
        request.wfile.write(data)
