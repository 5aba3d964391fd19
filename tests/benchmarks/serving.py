"""What do batch scoring and the server cost over the model alone, and what do they lose when things go wrong?

``python -m tests.benchmarks.serving PART ...`` measures single parts and puts their rows in their place in
``results/serving.json``. ``MTL_LORA_BENCH_ROWS`` sets the rows of a null model, ``MTL_LORA_BENCH_REQUESTS`` those of
the fuzzed requests.
"""

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from pipeline.contracts import Sample
from pipeline.modeling.predictor import Predictor
from pipeline.orchestration.cluster import cluster
from pipeline.orchestration.config import RayConfig
from pipeline.promotion.registry import Registry
from pipeline.serving.batch import ScoringJob, score_files
from tests.benchmarks.serving_faults import fuzz, hot_swap, killed_replica, overload
from tests.benchmarks.serving_load import ads_rows, load, process, registered, served, write_model
from tests.benchmarks.serving_memory import score_memory
from tests.benchmarks.timing import hardware, row, versions
from tests.processes import free_port

LAYERS, CLIENTS = 6, 32
FILES, ROWS_A_FILE = 32, 128
RESULT = Path(__file__).parent / "results" / "serving.json"


class Noted:
    """A predictor that notes when it ended each call.

    Args:
        folder: of the predictor.
        notes: folder of the notes, a file a process.
    """

    def __init__(self, folder: Path, notes: Path) -> None:
        self._predictor, self._notes = Predictor.load(folder, "cpu"), notes / str(os.getpid())

    def answer(self, samples: list[Sample]) -> list[tuple[str, float, int, str, list[float]]]:
        """Answer as the predictor does."""
        found = self._predictor.answer(samples)
        with self._notes.open("a") as file:
            file.write(f"{time.time()} {len(samples)}\n")
        return found


def _noted(folder: Path, notes: Path) -> Noted:
    return Noted(folder, notes)


def _score_speed(model: Path, folder: Path, workers: int) -> float:
    """Return rows a second of ``score`` while all its workers work."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        notes = Path(name) / "notes"
        notes.mkdir()
        tasks = Predictor.load(model, "cpu").spec.tasks
        job = ScoringJob(
            "m", partial(_noted, model, notes), tasks, str(folder / "in"), f"{name}/out", num_workers=workers
        )
        score_files(job)
        calls = [[tuple(map(float, line.split())) for line in p.read_text().splitlines()] for p in notes.iterdir()]
    begin, end = max(each[0][0] for each in calls), min(each[-1][0] for each in calls)
    speed = 0.0
    for each in calls:
        seen = [(when, rows) for when, rows in each if begin <= when <= end]
        speed += sum(rows for _, rows in seen[1:]) / (seen[-1][0] - seen[0][0])
    return speed


def _bare(model: Path, parts: list[list[dict[str, Any]]]) -> float:
    """Return rows a second of the scorer called directly on one thread."""
    torch.set_num_threads(1)
    predictor = Predictor.load(model, "cpu")
    predictor.answer(predictor.samples(parts[0]))
    begun = time.perf_counter()
    for part in parts:
        predictor.answer(predictor.samples(part))
    return sum(map(len, parts)) / (time.perf_counter() - begun)


def score_speed() -> list[dict[str, Any]]:
    """``score`` by one and by two actors over the scorer called directly, each on one thread."""
    with tempfile.TemporaryDirectory() as name, cluster(RayConfig(address="local")):
        folder = Path(name)
        model, rows = write_model(folder / "model", LAYERS), ads_rows(FILES * ROWS_A_FILE)
        (folder / "in").mkdir()
        parts = [rows[first : first + ROWS_A_FILE] for first in range(0, len(rows), ROWS_A_FILE)]
        for number, part in enumerate(parts):
            (folder / f"in/{number}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in part))
        alone = _bare(model, parts[: FILES // 2])
        one, two = (_score_speed(model, folder, workers) for workers in (1, 2))
        pair = _together(model, parts[: FILES // 2])
    seen = {"bare": alone, "one": one, "two": two, "two_bare_side_by_side": pair}
    return [
        row(
            "score, one actor: rows a second over the bare scorer's",
            ">= 0.9",
            one / alone,
            one >= 0.9 * alone,
            rows_a_second={name: round(value, 1) for name, value in seen.items()},
        ),
        row("score, two actors: rows a second over one actor's", ">= 1.7", two / one, two >= 1.7 * one),
        row("the machine's own limit: two bare scorers side by side over one", "-", pair / alone, None),
        row("score, two actors: rows a second over two bare scorers side by side", "-", two / pair, None),
    ]


def _together(model: Path, parts: list[list[dict[str, Any]]]) -> float:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return sum(pool.map(_bare, [model] * 2, [parts] * 2))


@contextmanager
def _mlflow(registry: Registry) -> Iterator[str]:
    """Yield the address of ``mlflow models serve``, which computes on as many threads as ours does."""
    port = free_port()
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    arguments = ["mlflow", "models", "serve", "-m", f"models:/{registry.name}@champion", "--env-manager", "local"]
    with process(
        [*arguments, "-p", str(port)], f"http://127.0.0.1:{port}/ping", MLFLOW_TRACKING_URI=registry.uri, **threads
    ):
        yield f"http://127.0.0.1:{port}/invocations"


def serve_speed(seconds: float = 25.0) -> list[dict[str, Any]]:
    """``serve`` over ``mlflow models serve`` with 32 clients, and one row alone over the scorer called directly."""
    rows = ads_rows(1024)
    pairs = [rows[first : first + 2] for first in range(0, len(rows), 2)]  # of two tasks each
    with registered(LAYERS) as registry:
        with _mlflow(registry) as url:
            bodies = [{"dataframe_records": pair} for pair in _filled(pairs)]
            load(url, bodies, clients=CLIENTS, seconds=3)
            theirs = load(url, bodies, clients=CLIENTS, seconds=seconds)
        with served(registry) as url:
            bodies = [{"rows": pair} for pair in pairs]
            load(f"{url}/v1/score", bodies, clients=CLIENTS, seconds=3)
            ours = load(f"{url}/v1/score", bodies, clients=CLIENTS, seconds=seconds)
            alone = _latency(registry, url, rows[:256])
    for found in (theirs, ours):
        if set(found.statuses) != {"200"}:
            raise RuntimeError(f"every request must be answered, got {found.statuses}")
    gain, tail = ours.per_second / theirs.per_second, ours.milliseconds(0.99) / theirs.milliseconds(0.99)
    return [
        row(
            f"serve over mlflow models serve, {CLIENTS} clients, two tasks a request: requests a second",
            ">= 3",
            gain,
            gain >= 3,
            ours=round(ours.per_second, 1),
            theirs=round(theirs.per_second, 1),
            threads={"ours": os.cpu_count(), "theirs": os.cpu_count()},
        ),
        row(
            "the same: p99 over theirs",
            "<= 1",
            tail,
            tail <= 1,
            ours_ms=round(ours.milliseconds(0.99)),
            theirs_ms=round(theirs.milliseconds(0.99)),
        ),
        *alone,
    ]


def _filled(pairs: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Return rows with the same fields each: MLflow makes a table of them."""
    return [[{k: v for k, v in each.items() if v is not None} for each in pair] for pair in pairs]


def _latency(registry: Registry, url: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    torch.set_num_threads(os.cpu_count() or 1)  # as the server's model
    with tempfile.TemporaryDirectory() as folder:
        predictor = Predictor.load(registry.download(1, Path(folder) / "model"), "cpu")

        def direct(each: dict[str, Any]) -> float:
            begun = time.perf_counter()
            predictor.answer(predictor.samples([each]))
            return time.perf_counter() - begun

        for each in rows[:8]:
            direct(each)
        scorer = [direct(each) for each in rows]
    server = load(f"{url}/v1/score", [{"rows": [each]} for each in rows], clients=1, seconds=12)
    over = server.milliseconds(0.5) - 1000 * statistics.median(scorer)
    return [
        row(
            "serve, one row at no load: ms at p50 over the scorer called directly",
            "<= 8",
            over,
            over <= 8,
            scorer_ms=round(1000 * statistics.median(scorer), 1),
            threads=torch.get_num_threads(),
        )
    ]


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "score_speed": score_speed,
    "score_memory": score_memory,
    "serve_speed": serve_speed,
    "hot_swap": hot_swap,
    "killed_replica": killed_replica,
    "overload": overload,
    "fuzz": fuzz,
}


def merged(parts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the result with the rows of some parts in the place of what stands there."""
    before = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    kept = {name: [line for line in before if line["part"] == name] for name in PARTS}
    rows = [{**line, "part": name} for name in PARTS for line in parts.get(name, kept[name])]
    return {
        "question": (__doc__ or "").partition("\n")[0],
        "command": "python -m tests.benchmarks.serving PART ...",
        "hardware": hardware(),
        "versions": versions("torch", "transformers", "ray", "fastapi", "mlflow"),
        "protocol": (
            f"SmolLM2 cut to {LAYERS} layers (one where faults are tried) under an adapter of the four synthetic Ads "
            "tasks; server, clients and model share the machine's cores; speeds of score while all actors work, in "
            f"pieces of {ROWS_A_FILE} rows; parts are measured one at a time, on a machine that others used as well "
            "where a row says so"
        ),
        "rows": rows,
        "not_measured": [name for name in PARTS if name not in {line["part"] for line in rows}],
    }


def run() -> dict[str, Any]:
    """Measure all parts."""
    return merged({name: part() for name, part in PARTS.items()})


def main(names: list[str]) -> None:
    """Measure the named parts and keep each when it is there."""
    if unknown := sorted(set(names) - set(PARTS)):
        raise SystemExit(f"a part must be one of {list(PARTS)}, got {unknown}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers end with this process
    for name in names or list(PARTS):
        found = PARTS[name]()
        RESULT.write_text(json.dumps(merged({name: found}), indent=2) + "\n", encoding="utf-8")
        print(json.dumps({name: found}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
