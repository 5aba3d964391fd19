"""Does validated, deduplicated writing keep up with a bare ``webdataset.ShardWriter`` loop over the same records?"""

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import webdataset as wds

from pipeline.contracts import TaskSpec
from pipeline.ingestion import DataConfig, prepare
from pipeline.synthetic import SyntheticAdsConfig, generate, synthetic_ads_tasks
from tests.benchmarks.timing import hardware, interleaved, ratio, row, versions

FILES, ROWS_A_FILE, SAMPLES_A_SHARD, ROUNDS = 8, 2500, 1000, 5
TASK = "query_ad_relevance"


def write_records(root: Path, files: int = FILES, rows: int = ROWS_A_FILE) -> list[Path]:
    """Write JSONL files of synthetic query-ad pairs and return them."""
    config = SyntheticAdsConfig(rows_per_day=rows, days=files + 1)
    paths = []
    for number in range(files):
        day = config.start.fromordinal(config.start.toordinal() + number)
        path = root / TASK / f"{day.isoformat()}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in generate(config, day)[TASK]))
        paths.append(path)
    return paths


def config_of(root: Path) -> DataConfig:
    """Return the configuration that prepares those files."""
    files = {TASK: {"train": f"{TASK}/*.jsonl"}}
    return DataConfig(source="records", root=str(root), files=files, samples_per_shard=SAMPLES_A_SHARD)


def tasks() -> list[TaskSpec]:
    """Return the task of those files."""
    return [task for task in synthetic_ads_tasks() if task.name == TASK]


def _bare(paths: list[Path], folder: Path) -> None:
    with wds.ShardWriter(str(folder / "bare-%06d.tar"), maxcount=SAMPLES_A_SHARD, verbose=0) as writer:
        for path in paths:
            with path.open("rb") as lines:
                for line in lines:
                    record = json.loads(line)
                    writer.write({"__key__": record["id"], "json": record})


def run() -> dict[str, Any]:
    """Time both in turns, and the preparation with two processes as well."""
    before = hardware()
    with tempfile.TemporaryDirectory() as name, multiprocessing.get_context("spawn").Pool(2) as pool:
        root = Path(name)
        paths = write_records(root / "in")

        def fresh(action: Callable[[Path], Any]) -> Callable[[], None]:
            def timed() -> None:
                with tempfile.TemporaryDirectory(dir=root) as folder:
                    action(Path(folder))

            return timed

        config = config_of(root / "in")
        seconds = interleaved(
            {
                "bare": fresh(lambda folder: _bare(paths, folder)),
                "one": fresh(lambda folder: prepare(config, tasks(), folder, 0)),
                "two": fresh(lambda folder: prepare(config, tasks(), folder, 0, mapper=pool.imap)),
            },
            rounds=ROUNDS,
            warm_up=1,
        )
    records = FILES * ROWS_A_FILE
    one, two = ratio(seconds, "bare", "one"), ratio(seconds, "bare", "two")
    rates = {name: round(records / min(values)) for name, values in seconds.items()}
    return {
        "question": __doc__,
        "hardware": before,
        "versions": versions("webdataset", "pydantic", "numpy"),
        "records": records,
        "best_records_per_s": rates,
        "rows": [
            row("validated writing, 1 process: rate over a bare ShardWriter loop", ">= 0.9", one, one >= 0.9),
            row("validated writing, 2 processes: rate over a bare ShardWriter loop", ">= 1.7", two, two >= 1.7),
        ],
        "not_measured": "network storage; images; more than 2 processes",
    }
