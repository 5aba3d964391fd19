"""Surfaces of what others answer or send: registry, clients, completions servers, jobs."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline.contracts import Sample, TaskSpec
from tests.hostile.drive import Put
from tests.hostile.mutations import VALUES, as_json, mutated_bytes, mutated_value
from tests.hostile.surfaces.records import RECORD, TASKS


class _Answers:
    """A registry that answers with versions whose tags somebody has changed."""

    def __init__(self) -> None:
        self.versions: list[Any] = []

    def search_model_versions(self, *_: Any, **__: Any) -> Any:
        class Page(list[Any]):
            token = None

        return Page(self.versions)


def ledger(folder: Path) -> Put:
    """Entries of the ledger of champions and of the lease, changed in the registry."""
    from pipeline.promotion.entries import champions, running_hash, signature
    from pipeline.promotion.lease import Lease
    from pipeline.promotion.ledger import Ledger

    client = _Answers()
    book, lease = Ledger(client, "m"), Lease(client, "m")
    entries: list[dict[str, str]] = []
    before = ""
    for number in range(1, 4):
        tags = {
            "action": "promote",
            "version": str(number),
            "previous": str(number - 1) if number > 1 else "",
            "why": '["better"]',
            "who": "ads",
            "after": str(number - 1),
            "decision": f"PROMOTE {'d' * 64} anchor {number}",
            "before_sha256": before,
        }
        tags["sha256"] = signature(tags)
        entries.append(tags)
        client.versions = [SimpleNamespace(version=str(number), tags=tags, creation_timestamp=1, name="m")]
        before = running_hash(before, book.entries()[0])
    holding = {"after": "0", "who": "ads", "ttl_s": "120.0", "beat": "3 1700000000.5", "released": ""}
    texts = [
        *(v for v in VALUES if isinstance(v, str)),
        "1",
        "0",
        "-1",
        "²",
        "1 nan",
        "inf",
        "1e400",
        "[",
        '{"a": 1}',
        "١",
    ]

    def put(rng: random.Random) -> bool:
        is_ledger = rng.random() < 0.7
        found = [dict(tags) for tags in entries] if is_ledger else [dict(holding), {**holding, "after": "1"}]
        for _ in range(rng.choice((1, 1, 2))):
            tags = rng.choice(found)
            name = rng.choice(list(tags))
            if rng.random() < 0.15:
                tags.pop(name)
            elif rng.random() < 0.5:
                tags[name] = rng.choice(texts)
            else:
                tags[name] = mutated_bytes(rng, tags[name].encode("utf-8", "replace")).decode("utf-8", "replace")
            if is_ledger and rng.random() < 0.5 and {"action", "version", "why"} <= tags.keys():
                try:
                    tags["sha256"] = signature(tags)  # whoever edits may know how it is made
                except KeyError:
                    tags.pop("sha256", None)
        stamps = (1, 1_700_000_000_000, 0)
        client.versions = [
            SimpleNamespace(version=str(n), tags=tags, creation_timestamp=rng.choice(stamps), name="m")
            for n, tags in enumerate(found, 1)
        ]
        if not is_ledger:
            for one in lease._chain():
                assert one.number > 0
            return True
        chain = champions(book.standing())
        for entry in chain:
            assert entry.version >= 0 and (entry.anchor is None or entry.anchor >= 0)
        return bool(chain)

    return put


def tags(folder: Path) -> Put:
    """Tags of registered versions, which whoever may write to the registry may set."""
    from pipeline.promotion.card import model_card
    from pipeline.promotion.provenance import Foreign, Provenance

    made = Provenance.model_validate(
        {
            "run": "weekly",
            "manifest_sha256": "a" * 64,
            "tasks": ("a", "b"),
            "files": {"predictor.json": "b" * 64},
            "metrics": {"a": 0.5, "b": None},
            "window": ("2026-01-05", "2026-01-06"),
            "macro": 0.5,
            "parent": 3,
            "holdout": {"a": "c" * 64},
        }
    ).tags()

    def put(rng: random.Random) -> bool:
        found = mutated_value(rng, made, [v for v in VALUES if isinstance(v, str)])
        if rng.random() < 0.5:
            name = rng.choice(list(made))
            try:
                value = json.loads(made[name])
            except ValueError:
                value = made[name]
            found = {**made, name: as_json(rng, mutated_value(rng, value)).decode("utf-8", "replace")}
        if not isinstance(found, dict):
            return False
        found = {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
        read = Provenance.from_tags(found)
        if isinstance(read, Foreign):
            return not read.reason.encode()  # a reason is UTF-8
        again = Provenance.from_tags(read.tags())
        assert again == read and model_card("m", TASKS, None, read)
        return True

    return put


class _NullScorer:
    """Scores without a model: what surrounds one is tried here."""

    def replies(self, samples: Sequence[Sample]) -> list[Any]:
        from pipeline.modeling.scoring import Reply

        known = {task.name: task.num_classes for task in TASKS}
        counts = [known[sample.task] or len(sample.choices) for sample in samples]
        return [Reply(np.full(count, 1 / count)) for count in counts]


def requests(folder: Path) -> Put:
    """Bodies, headers and rows that are sent to the server: each is answered with 200 or refused with 4xx."""
    from fastapi import Request

    from pipeline.modeling.base_model import BaseModelConfig
    from pipeline.modeling.predictor import Predictor, PredictorSpec
    from pipeline.serving.batching import Version
    from pipeline.serving.server import ScoreServer
    from pipeline.serving.server_config import ServerConfig

    predictor = Predictor(PredictorSpec(tasks=TASKS, base=BaseModelConfig()), _NullScorer())  # type: ignore[arg-type]
    version = Version("models:/m/1", predictor)

    async def answer(asked: Any) -> Any:
        return version.words, version.answer_each(asked)

    models = SimpleNamespace(answer=SimpleNamespace(remote=answer))
    kind = ScoreServer.func_or_class.__mro__[1]  # the class itself, without the replica that Ray Serve makes of it
    server = kind(ServerConfig(model="models:/m@champion", max_rows=8, max_bytes=1 << 16), models)
    loop = asyncio.new_event_loop()
    server._live._watch = asyncio.Future(loop=loop)  # nothing is followed: there is no challenger
    body = {"rows": [RECORD, {"task": "pick", "text": "x", "choices": ["a", "b"]}], "key": "user-1"}
    body["rows"][0] = {name: RECORD[name] for name in ("task", "text", "other", "image")}  # type: ignore[index]

    async def ask(data: bytes, headers: list[tuple[bytes, bytes]]) -> Any:
        parts = [data[: len(data) // 2], data[len(data) // 2 :]]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": headers, "query_string": b""}
        return await server.score(Request(scope, receive))

    def put(rng: random.Random) -> bool:
        value = mutated_value(rng, body, [*VALUES, *(task.name for task in TASKS), [RECORD] * 9])
        data = as_json(rng, value) if rng.random() < 0.8 else mutated_bytes(rng, json.dumps(body).encode())
        headers = [(b"x-request-id", mutated_bytes(rng, b"request-1")), (b"authorization", rng.randbytes(9))]
        found = loop.run_until_complete(ask(data, headers))
        assert found.status_code == 200 or 400 <= found.status_code < 500, f"{found.status_code} {found.body!r}"
        told = json.loads(found.body)
        assert b"Traceback" not in found.body and ("error" in told) == (found.status_code != 200)
        return bool(found.status_code == 200)

    return put


def answers(folder: Path) -> Put:
    """What a completions server answers: scores out of it are finite, or it is refused."""
    from http.server import BaseHTTPRequestHandler

    from pipeline.modeling.base_model import BaseModelConfig
    from pipeline.modeling.encoding import Encoder
    from pipeline.serving.exported_task import ExportedBase, ExportedTask
    from pipeline.serving.openai_client import LabelClient
    from tests.pipeline.local_server import LocalServer
    from tests.pipeline.modeling.tiny import tiny_tokenizer

    class Server(LocalServer):
        """Answers with what it is told to."""

        body, status = b"", 200

        def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
            request.rfile.read(int(request.headers["Content-Length"]))
            request.send_response(self.status)
            request.send_header("Content-Length", str(len(self.body)))
            request.end_headers()
            request.wfile.write(self.body)

    spec, tokenizer = TaskSpec(name="t", template="{text}:", label_words=(" no", " yes")), tiny_tokenizer()
    base = BaseModelConfig(max_length=48)
    words = Encoder(tokenizer, [spec], base.max_length).label_tokens("t")
    task = ExportedTask(
        name="t",
        kind="binary",
        template=spec.template,
        label_words=spec.label_words,
        label_tokens=tuple(map(tuple, words)),
        label_values=(),
        choices_field=None,
        length_normalized=False,
        max_length=48,
        base=ExportedBase(name="tiny", fingerprint=None),
    )
    server = Server().__enter__()
    server._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who asks may hang up
    client = LabelClient(server.url, task, tokenizer, timeout_s=2)
    rows = [{"text": "ab"}]
    length = len(client._encoder.encode([client._sample("0", rows[0])])[0].prompt) + len(words[0])
    good = {
        "choices": [
            {"index": n, "text": "x", "logprobs": {"token_logprobs": [None, *[-0.5 - n] * length]}} for n in range(2)
        ]
    }

    def put(rng: random.Random) -> bool:
        server.status = rng.choice((200,) * 20 + (204, 404, 500, 503))
        server.body = as_json(rng, mutated_value(rng, good, [*VALUES, float("-inf")]))
        (found,) = client.probabilities(rows)
        assert found.shape == (2,) and np.isfinite(found).all() and abs(found.sum() - 1) < 1e-9, found
        return True

    return put


def messages(folder: Path) -> Put:
    """Lines of a job's log: a result is one only under the job's own token."""
    from pipeline.progress import Result, WorkDone, received

    token = "0123456789abcdef"
    kinds = (
        {"kind": "result", "value": {"verdict": "PROMOTE"}},
        {
            "kind": "progress",
            "what": "train",
            "done": 3,
            "total": 9,
            "unit": "steps",
            "seconds_spent": 1.5,
            "seconds_left": None,
        },
        {"kind": "said", "text": "hello"},
    )

    def put(rng: random.Random) -> bool:
        told = token if rng.random() < 0.7 else rng.choice(("", "x", token[:-1], token.upper(), f" {token}", "None"))
        fields = as_json(rng, mutated_value(rng, rng.choice(kinds))).decode("utf-8", "replace")
        line = f"@mtl-lora {told} {fields}".replace("\n", " ")
        if rng.random() < 0.3:
            line = mutated_bytes(rng, line.encode()).decode("utf-8", "replace")
        found = received(line, token)
        assert not isinstance(found, Result) or line.startswith(f"@mtl-lora {token} ")
        if isinstance(found, WorkDone | Result):
            assert str(found)
        return found is not None

    return put
