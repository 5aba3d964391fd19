"""A web server over TLS with a certificate of its own, for files in a folder; it can be told to fail."""

from __future__ import annotations

import email.utils
import hashlib
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from tests.pipeline.local_server import LocalServer


class HttpsServer(LocalServer):
    """Serves a folder; a context manager.

    Attributes:
        url: of the folder.
        failures: statuses that the next requests get, in their order; 0 breaks off in the middle of a body.
        answers_ranges: as most web servers do.
        answers_head: else 405.
        tells_size: else chunks of a size that is not told.
        tells_etag: else the time of a file's last change alone.
        requests: counts what was asked for, by method.
    """

    def __init__(self, folder: Path, certificate: Path) -> None:
        self.folder, self.failures = folder, list[int]()
        self.answers_ranges = self.answers_head = self.tells_size = self.tells_etag = True
        super().__init__(certificate)

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        self.requests[request.command] += 1
        failure = self.failures.pop(0) if self.failures and (with_body or self.failures[0]) else None
        path = self.folder / unquote(urlparse(request.path).path).lstrip("/")
        if failure or (not with_body and not self.answers_head) or not path.is_file():
            status = failure or (404 if not path.is_file() else 405)
            return _send(request, status, b"", {"Content-Length": "0"}, with_body)
        data = path.read_bytes()
        headers = {"Last-Modified": email.utils.formatdate(path.stat().st_mtime, usegmt=True)}
        if self.tells_etag:
            headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        status, limits = 200, request.headers.get("Range")
        if limits and self.answers_ranges:
            first, _, last = limits.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data)), len(data) - 1)
            if start >= len(data):
                return _send(request, 416, b"", {"Content-Length": "0"}, with_body)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            status, data = 206, data[start : end + 1]
        if self.tells_size:
            headers["Content-Length"] = str(len(data))
        else:
            headers["Connection"] = "close"
        return _send(request, status, data[: len(data) // 2] if failure == 0 else data, headers, with_body)


def _send(request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    if with_body:
        request.wfile.write(data)
    if len(data) < int(headers.get("Content-Length", 0)) or "Connection" in headers:
        request.close_connection = True


def certificate(folder: Path) -> Path:
    """Make a key and a certificate for localhost, and let this process's clients trust it; skip without openssl."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("needs the program openssl, which makes the certificate of a web server")
    place = folder / "localhost.pem"
    command = [
        program,
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    command += [
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        str(place),
        "-out",
        str(folder / "certificate.pem"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    with place.open("ab") as file:
        file.write((folder / "certificate.pem").read_bytes())
    # What SSL_CERT_FILE does before a process begins: the client has one context, made when it is imported.
    import_module("aiohttp.connector").__dict__["_SSL_CONTEXT_VERIFIED"].load_verify_locations(
        folder / "certificate.pem"
    )
    return place
