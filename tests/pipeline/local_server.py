"""A web server of a test on the loopback: each request is one call of :meth:`LocalServer.answer`."""

from __future__ import annotations

import ssl
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self


class LocalServer:
    """Answers HEAD, GET and POST; a context manager.

    Args:
        certificate: with its key, for TLS; None for plain HTTP.

    Attributes:
        url: of its root.
        requests: counts what was asked for.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self.requests: Counter[str] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                server.answer(self, with_body=False)

            def do_GET(self) -> None:
                server.answer(self, with_body=True)

            do_POST = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.url = f"https://localhost:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        """Send a request's answer.

        Args:
            request: what was asked, and where the answer goes.
            with_body: false for HEAD.
        """
        raise NotImplementedError
