"""The parts of the serving benchmark in which something goes wrong: swaps, a killed replica, overload, nonsense."""

import os
import random
import string
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import requests

from pipeline.modeling.predictor import Predictor
from pipeline.promotion.registry import Registry
from tests.benchmarks.serving_load import (
    Answers,
    Connection,
    ads_rows,
    fronts,
    load,
    private_mib,
    registered,
    replicas,
    served,
)
from tests.benchmarks.timing import row
from tests.pipeline.promotion.conftest import promote

SWAPS, OVERLOAD_S = 20, 60.0
REQUESTS = int(os.environ.get("MTL_LORA_BENCH_REQUESTS", "100000"))
_FUZZERS = 16
_TOLERANCE = 1e-3
"""Scores of rows that are packed otherwise differ by rounding, those of the two versions by far more."""


class _Right:
    """Whether an answer is that of the version it names, and a refusal one that may be.

    Args:
        registry: of the versions.
        rows: that are asked, always the same.
    """

    def __init__(self, registry: Registry, rows: list[dict[str, Any]]) -> None:
        self.seen: set[str] = set()
        self.bad: list[str] = []
        self._scores = {}
        for number in [number for number, _ in registry.versions()]:
            with tempfile.TemporaryDirectory() as folder:
                predictor = Predictor.load(registry.download(number, Path(folder) / "model"), "cpu")
                answers = predictor.answer(predictor.samples(rows))
                self._scores[f"models:/{registry.name}/{number}"] = [score for _, score, *_ in answers]

    def __call__(self, status: int, headers: Any, body: Any) -> bool:
        if status == 200:
            self.seen.add(body["model"])
            found = [answer["score"] for answer in body["answers"]]
            wanted = self._scores[body["model"]]
            is_right = all(abs(a - b) < _TOLERANCE for a, b in zip(found, wanted, strict=True))
        else:
            is_right = status in (429, 503) and "Retry-After" in headers
        if not is_right:
            self.bad.append(f"{status} {str(body)[:300]}")
        return is_right


def _in_background(**options: Any) -> tuple[threading.Thread, list[Answers], threading.Event]:
    found: list[Answers] = []
    stop = threading.Event()
    thread = threading.Thread(target=lambda: found.append(load(**options, stop=stop)))
    thread.start()
    return thread, found, stop


def hot_swap() -> list[dict[str, Any]]:
    """The alias moves 20 times between two versions while clients ask."""
    rows = ads_rows(2)
    with registered(1, versions=2) as registry:
        is_right = _Right(registry, rows)
        with served(registry, "--poll-s", "0.2") as url:
            options = {"bodies": [{"rows": rows}], "clients": 8, "seconds": 230, "judge": is_right}
            thread, found, stop = _in_background(url=f"{url}/v1/score", **options)
            waits = []
            for turn in range(SWAPS):
                number = 2 - turn % 2
                begun = time.perf_counter()
                promote(registry, number)
                while requests.get(f"{url}/readyz", timeout=30).json()["model"] != f"models:/{registry.name}/{number}":
                    time.sleep(0.05)
                waits.append(time.perf_counter() - begun)
            stop.set()
            thread.join()
    (answers,) = found
    failed = sum(count for status, count in answers.statuses.items() if status != "200")
    return [
        row(f"hot swap, {SWAPS} times under load: requests lost", "0", failed, failed == 0, statuses=answers.statuses),
        row("the same: answers of another version than they name", "0", answers.wrong, answers.wrong == 0),
        row("the same: longest time in s from promotion to the new version's answer", "-", max(waits), None),
    ]


def killed_replica() -> list[dict[str, Any]]:
    """One of two replicas is killed while clients ask."""
    rows = ads_rows(2)
    with registered(1) as registry:
        is_right = _Right(registry, rows)
        with served(registry, "--replicas", "2") as url:
            ask = {"url": f"{url}/v1/score", "bodies": [{"rows": rows}]}
            load(**ask, clients=8, seconds=3)
            before = load(**ask, clients=8, seconds=6)
            thread, found, stop = _in_background(**ask, clients=8, seconds=120, judge=is_right)
            time.sleep(3)
            replicas()[0].kill()
            killed = time.perf_counter()
            while len(replicas()) < 2 or time.perf_counter() - killed < 10:  # the next one's process is there
                time.sleep(0.2)
            stop.set()
            thread.join()
            while load(**ask, clients=8, seconds=2).per_second < 0.8 * before.per_second:
                if time.perf_counter() - killed > 90:
                    break
            normal = time.perf_counter() - killed
    (during,) = found
    lost = sum(count for status, count in during.statuses.items() if status not in ("200", "429", "503"))
    return [
        row(
            "a model of two killed under load: requests that end otherwise than 200, 429, 503 with Retry-After",
            "0",
            lost + during.wrong,
            lost + during.wrong == 0,
            statuses=during.statuses,
            bad=is_right.bad[:3],
        ),
        row("the same: s until the requests a second are within 0.8 of before", "<= 10", normal, normal <= 10),
    ]


def overload() -> list[dict[str, Any]]:
    """Ten times as many clients as the server has places for rows, for a minute."""
    rows = ads_rows(2)
    with registered(6) as registry:
        is_right = _Right(registry, rows)
        with served(registry, "--max-waiting-rows", "64") as url:
            ask = {"url": f"{url}/v1/score", "bodies": [{"rows": rows}]}
            load(**ask, clients=4, seconds=3)
            before = load(**ask, clients=4, seconds=8)
            during = load(**ask, clients=320, seconds=OVERLOAD_S, judge=is_right, pause_s=0.25)
            back = _seconds_until_normal(ask, before)
    lost = sum(count for status, count in during.statuses.items() if status not in ("200", "429", "503"))
    offered = sum(during.statuses.values()) / during.elapsed_s
    return [
        row(
            "overload for a minute: requests that end otherwise than 200, 429, 503 with Retry-After",
            "0",
            lost + during.wrong,
            lost + during.wrong == 0,
            statuses=during.statuses,
            bad=is_right.bad[:3],
            offered_over_capacity=round(offered / before.per_second, 1),
        ),
        row(
            "the same: requests answered a second over those without overload",
            "-",
            during.per_second / before.per_second,
            None,
        ),
        row("the same: s until the median time is normal again", "<= 10", back, back <= 10),
    ]


def _seconds_until_normal(ask: dict[str, Any], before: Answers) -> float:
    begun = time.perf_counter()
    while time.perf_counter() - begun < 60:
        now = load(**ask, clients=4, seconds=1)
        if set(now.statuses) == {"200"} and now.milliseconds(0.5) <= 1.2 * before.milliseconds(0.5):
            return time.perf_counter() - begun - 1
    return 60.0


def nonsense(seed: int, tasks: list[str]) -> Iterator[tuple[str, str, bytes, dict[str, str]]]:
    """Yield method, path, body and headers of requests that nothing may answer with 200."""
    import json

    rng = random.Random(seed)

    def text(most: int = 40) -> str:
        kinds = (string.printable, "\x00\ud800\udfff\U0001f600é漢", "{}[]\":,\\'", "0123456789eE+-.")
        return "".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randrange(most)))

    def value(depth: int = 0) -> Any:
        kind = rng.randrange(9 if depth < 4 else 6)
        if kind < 6:
            return (None, True, rng.randrange(-(10**30), 10**30), rng.uniform(-1e300, 1e300), text(), float("nan"))[
                kind
            ]
        some = range(rng.randrange(4))
        return [value(depth + 1) for _ in some] if kind < 8 else {text(8): value(depth + 1) for _ in some}

    while True:
        task = rng.choice(tasks)
        broken: list[Any] = [
            {"rows": value()} if rng.random() < 0.5 else value(),
            {"rows": [{"task": task, "text": text()}]},  # lacks the task's own fields
            {"rows": [{"task": text(), "query": text()}]},
            {"rows": [{"task": task, "query": value(2) if rng.random() < 0.5 else [text()]}]},
            {"rows": [{"task": task}] * rng.randrange(257, 400)},
            {"rows": [], "more": text()},
        ]
        body = json.dumps(rng.choice(broken)).encode()
        kind = rng.randrange(8)
        if kind == 0:
            body = rng.randbytes(rng.randrange(200))
        elif kind == 1:
            body = body[: rng.randrange(len(body) + 1)] + b"\xff"
        elif kind == 2:
            body = rng.choice((b"[", b'{"rows":[', b'{"a":')) * rng.randrange(1, 5000)
        method = rng.choice(("POST",) * 12 + ("GET", "PUT", "DELETE"))
        path = "/v1/score" if method == "POST" or rng.random() < 0.5 else f"/v1/{rng.randrange(10**6)}"
        token = {} if rng.random() < 0.1 else {"Authorization": "Bearer a-token"}
        yield method, path, body, token


def fuzz() -> list[dict[str, Any]]:
    """Requests of nonsense, and the memory of the replica from the first tenth of them to the last."""
    statuses: Counter[int] = Counter()
    answered: list[str] = []

    def client(url: str, seed: int, count: int) -> None:
        connection = Connection(url.removeprefix("http://"))
        for method, path, body, headers in islice(nonsense(seed, tasks), count):
            answer, found = connection.ask(method, path, body, headers)
            statuses[answer.status] += 1
            if not 400 <= answer.status < 500 or b"Traceback" in found:
                answered.append(f"{method} {path} {body[:200]!r} → {answer.status} {found[:200]!r}")

    def all_clients(url: str, seed: int, count: int) -> None:
        with ThreadPoolExecutor(_FUZZERS) as pool:
            list(pool.map(lambda n: client(url, seed + n, -(-count // _FUZZERS)), range(_FUZZERS)))

    with registered(1) as registry, served(registry, token="a-token") as url:
        headers = {"Authorization": "Bearer a-token"}
        known = requests.get(f"{url}/v1/tasks", headers=headers, timeout=10).json()["tasks"]
        tasks = [name for name, task in known.items() if len(task["fields"]) > 1]  # nonsense brings one field at most
        (replica,) = fronts()
        all_clients(url, 0, REQUESTS // 10)
        before = private_mib(replica)
        all_clients(url, 1000, REQUESTS - REQUESTS // 10)
        grown = private_mib(replica) - before
    return [
        row(
            f"fuzzed requests, {sum(statuses.values()):,}: answers that are no 4xx, or hold a stack trace",
            "0",
            len(answered),
            not answered,
            statuses={str(status): count for status, count in sorted(statuses.items())},
            first=answered[:3],
        ),
        row("the same: MiB the server has grown since the first tenth", "<= 8", grown, grown <= 8),
    ]
