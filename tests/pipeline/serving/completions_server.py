"""A stand-in for vLLM: its completions protocol over the real model, PEFT's adapters on the base."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch


class CompletionsServer(HTTPServer):
    """Answers ``/v1/completions`` as ``vllm/entrypoints/openai/completion/serving.py`` does.

    Args:
        model: a PEFT model whose adapters are the names that requests may ask for.
        tokenizer: shows tokens as text, and takes prompts of text.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.echoes = True
        """False for a server that ignores ``echo``."""
        self.api_key: str | None = None
        self.requests: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return the status and the answer to a request."""
        self.requests.append(body)
        if body["model"] not in self.model.peft_config:
            message = f"The model `{body['model']}` does not exist."
            return 404, {"error": {"message": message, "type": "NotFoundError", "code": 404}}
        self.model.set_adapter(body["model"])
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        prompts = [self.tokenizer(p)["input_ids"] if isinstance(p, str) else p for p in prompts]
        choices = [self._choice(index, ids, body) for index, ids in enumerate(prompts)]
        choices.reverse()  # the protocol's order is the index
        return 200, {"object": "text_completion", "model": body["model"], "choices": choices}

    @torch.inference_mode()
    def _choice(self, index: int, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        log_p = self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        following = int(log_p[-1].argmax())
        each: list[float | None] = [None, *(float(log_p[i, token]) for i, token in enumerate(ids[1:]))]
        tokens, each = [*ids, following], [*each, float(log_p[-1, following])]
        shown = slice(None if body["echo"] and self.echoes else len(ids), None)
        logprobs = {
            "tokens": [self.tokenizer.decode(token) for token in tokens[shown]],
            "token_logprobs": each[shown],
        }
        return {"index": index, "text": "".join(logprobs["tokens"]), "logprobs": logprobs, "finish_reason": "length"}


class _Handler(BaseHTTPRequestHandler):
    server: CompletionsServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.server.api_key
        if self.path != "/v1/completions":
            status, answer = 404, {"detail": "Not Found"}
        elif key is not None and self.headers["Authorization"] != f"Bearer {key}":
            status, answer = 401, {"error": "Unauthorized"}
        else:
            status, answer = self.server.complete(body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing: the test reads ``requests``."""


@contextmanager
def serving(model: Any, tokenizer: Any) -> Iterator[CompletionsServer]:
    """Run a server in a thread for as long as the block lasts."""
    server = CompletionsServer(model, tokenizer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
