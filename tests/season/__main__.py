"""Twelve weeks of synthetic Ads data with drift through the real loop: registry, Ray cluster, MLflow server, faults.

Run with ``make season``; ``python -m tests.season --short`` is four weeks on a cut model: the mechanics alone, no claim
on what was learnt. Every retraining is the ``mtl-lora retrain`` command in a process of its own. After each week its
champion scores a day's input by ``mtl-lora score`` (in the short season after the last one). What must hold is asserted
as the weeks pass; at the end ``runs/season/season.html`` shows each task's metric a week for the retrained model, for
the first one left alone, and the best attainable, with the ledger of champions.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil
import yaml

from jobs.config import RunConfig, load_config
from pipeline.contracts import EvaluationReport, ShardManifest, TaskSpec
from pipeline.evaluation.predict import predict
from pipeline.evaluation.score_table import write_scores
from pipeline.evaluation.summary import summarize
from pipeline.ingestion import DataConfig, prepare
from pipeline.modeling.predictor import Predictor
from pipeline.progress import say
from pipeline.promotion.registry import Registry
from pipeline.stream import read_split
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks, write_partition
from tests.processes import free_port, kill_tree
from tests.season.daily_scores import score_day
from tests.season.page import LAST_WEEKS, Week, write_page

START = dt.date(2026, 1, 5)
HISTORY_DAYS = 14
"""Days before the first week's, so that the first training has enough."""
MEASURED_ROWS_PER_DAY = 80
"""Of each task, on which what retraining gained is measured at the end."""
NEW_TASK, RETIRED_TASK, FLIPPED_TASK = "query_vertical", "ad_landing_page_consistency", "query_ad_relevance"


class Event(StrEnum):
    """What happens in a week, as its page says it."""

    FIRST = "first training"
    ORDINARY = "an ordinary week"
    BAD = "5 % malformed rows"
    FLIPPED = f"labels of {FLIPPED_TASK} flipped"
    NEW = f"{NEW_TASK} is new"
    WORKER = "a worker killed"
    DRIVER = "the driver killed, run again"
    SERVER = "the MLflow server killed for 20 s"
    TWICE = "two schedulers fired at once: one refused"
    ROLLBACK = "rolled back by hand after its promotion"
    RETIRE = f"{RETIRED_TASK} ends"
    NOTHING = "no new data"


FULL = tuple(Event)
"""The twelve weeks in their order."""
SHORT = (Event.FIRST, Event.BAD, Event.TWICE, Event.NOTHING)


class Season:
    """The state of the season.

    Args:
        folder: everything goes there; emptied first.
        ads: the synthetic data.
        short: on a cut model, in few weeks.
    """

    def __init__(self, folder: Path, ads: SyntheticAdsConfig, short: bool) -> None:
        self.folder, self.ads, self.short = folder, ads, short
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.port = free_port()
        self.server: subprocess.Popen[bytes] | None = None
        self.tasks = [task for task in synthetic_ads_tasks() if task.name != NEW_TASK]
        self.retired: list[str] = []
        self.brought = START
        self.weeks: list[Week] = []

    @property
    def config_path(self) -> Path:
        """The loop's configuration."""
        return self.folder / "season.yaml"

    def write_config(self) -> RunConfig:
        """Write the loop's configuration as it is this week."""
        training: dict[str, Any] = {"global_batch_size": 16, "micro_batch_size": 8, "learning_rate": 0.003}
        training |= {"checkpoint_steps": 10, "log_steps": 5, "ledger": True, "warmup_share": 0.1}
        if self.short:
            training |= {"checkpoint_steps": 4, "log_steps": 2}
        config = {
            "name": "season",
            "run_root": str(self.folder),
            "data": {"source": "records", "root": str(self.folder / "partitions"), "max_rejected_share": 0.1},
            "tasks": [task.model_dump(mode="json") for task in self.tasks],
            "model": {"num_layers": 2} if self.short else {},
            "length_grouping": {"window_steps": 4},
            "training": training,
            "retraining": {
                "holdout_days": 3,
                "replay_days": 14,
                "replay_share": 0.1,
                "max_champion_drop": 0.5 if self.short else 0.2,
                "lease_ttl_s": 20,
            },
            "promotion": {
                "model_name": "season-ads",
                "gates": {
                    "beat_base": False,
                    "gain": "none",
                    "margin": 1.0 if self.short else 0.2,
                    "min_samples": 20,
                    "min_rarer_class": 1 if self.short else 10,
                    "retired": self.retired,
                },
            },
            "drift": {
                "thresholds": {name: {"warn": 0.5, "hold": 9} for name in ("label_psi", "length_psi", "new_words")}
            },
            "tracking": {"uri": f"http://127.0.0.1:{self.port}"},
        }
        self.config_path.write_text(yaml.safe_dump(config, sort_keys=False))
        return load_config(self.config_path)

    def registry(self) -> Registry:
        """The model's registry, on the server."""
        return Registry("season-ads", f"http://127.0.0.1:{self.port}")

    def bring(
        self, days: int, change: Callable[[str, list[dict[str, Any]]], list[dict[str, Any]]] | None = None
    ) -> None:
        """Bring the next daily partitions, changed if asked for; only the running tasks have files."""
        for _ in range(days):
            self.write_day(self.brought, change)
            self.brought += dt.timedelta(days=1)

    def write_day(
        self, day: dt.date, change: Callable[[str, list[dict[str, Any]]], list[dict[str, Any]]] | None = None
    ) -> None:
        """Write one day's partition, its marker last."""
        root = self.folder / "partitions"
        running = {task.name for task in self.tasks}
        for path in write_partition(self.ads, day, root):
            task = path.name.split(".")[0]
            if task not in running:
                path.unlink()
            elif change is not None:
                rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
                buffer = io.BytesIO()
                with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
                    file.writelines(json.dumps(row).encode() + b"\n" for row in change(task, rows))
                path.write_bytes(buffer.getvalue())
        (root / day.isoformat() / "_SUCCESS").touch()

    def start_server(self) -> None:
        """Start the MLflow server and wait until it answers."""
        store = f"sqlite:///{self.folder / 'mlflow.db'}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", store, "--artifacts-destination", (self.folder / "mlartifacts").as_uri()]
        log = (self.folder / "mlflow.log").open("ab")
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command += ["--serve-artifacts", "--workers", "1"]
        self.server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        end = time.monotonic() + 240
        while time.monotonic() < end:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2),
            ):
                return
            time.sleep(0.5)
        raise AssertionError("the MLflow server did not come up")

    def stop_server(self) -> None:
        """Kill the MLflow server as a power cut would."""
        if self.server is not None:
            kill_tree(self.server)
            self.server = None

    def start(self) -> subprocess.Popen[str]:
        """Start one retraining as of the newest day brought."""
        command = [sys.executable, "-m", "jobs.cli", "retrain", "--config", str(self.config_path), "--json"]
        log = (self.folder / "retrain.log").open("a")
        environment = {**os.environ, "RAY_worker_niceness": "0"}
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)

    def retrain(self, week: int, event: Event, expect: int = 0, fault: Callable[[], None] | None = None) -> None:
        """Retrain, with a fault in the middle, and note what came of it."""
        self.write_config()
        began = time.monotonic()
        process = self.start()
        if fault is not None:
            fault()
        code = process.wait(timeout=3600)
        assert code == expect, f"week {week}: exit code {code} instead of {expect}; see {self.folder / 'retrain.log'}"
        self.note(week, event, began)

    def note(self, week: int, event: Event, began: float) -> None:
        """Keep what this week's run came to."""
        result = self.newest_result()
        self.weeks.append(
            Week(week, event.value, result["verdict"], self.champion(), result.get("run", ""), result["reasons"])
        )
        say(f"week {week}: {result['verdict']}, champion {self.champion()}, {time.monotonic() - began:.0f} s ({event})")

    def newest_result(self) -> dict[str, Any]:
        """The newest notice: what the loop said last."""
        lines = (self.folder / "notices.jsonl").read_text().splitlines()
        notice = json.loads(lines[-1])
        return {"verdict": notice["event"], "reasons": notice["reasons"], "run": notice.get("run", "")}

    def champion(self) -> int:
        """The present champion's number, 0 for none."""
        champion = self.registry().champion()
        return champion.number if champion else 0

    def newest_run(self) -> Path:
        """The folder of the newest run."""
        runs = [path for path in self.folder.glob("season-2026-*") if path.is_dir()]
        return max(runs, key=lambda path: path.stat().st_mtime)

    def wait_for_training(self, steps: int) -> None:
        """Wait until a run that is newer than the last finished one has trained so many steps."""
        end = time.monotonic() + 1200
        while time.monotonic() < end:
            for path in self.folder.glob("season-2026-*/history.jsonl"):
                if not (path.parent / "result.json").exists() and len(path.read_text().splitlines()) >= steps:
                    return
            time.sleep(0.2)
        raise AssertionError("training did not begin")


def malformed(task: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spoil one row in twenty."""
    del task
    return [{"id": row["id"], "date": row["date"]} if place % 20 == 7 else row for place, row in enumerate(rows)]


def flipped(task: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn the labels of one task round."""
    return [{**row, "label": 1 - row["label"]} if task == FLIPPED_TASK else row for row in rows]


def training_workers() -> list[psutil.Process]:
    """The processes of the training ranks."""
    found = []
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        title = " ".join(process.info["cmdline"] or ())
        if title.startswith("ray::RayTrainWorker"):
            found.append(process)
    return found


def kill_a_worker(season: Season) -> None:
    """Kill one rank in the middle of training."""
    season.wait_for_training(2)
    victims = training_workers()
    assert victims, "no training worker was found"
    victims[-1].send_signal(signal.SIGKILL)
    say(f"killed rank process {victims[-1].pid}")


def kill_the_driver(season: Season) -> None:
    """Kill the command, its job and its cluster in the middle of training."""
    season.write_config()
    process = season.start()
    season.wait_for_training(3)
    kill_tree(process)
    say("killed the driver, the job and the cluster")
    time.sleep(25)  # the lease of the killed one expires


def kill_the_server(season: Season) -> None:
    """Take the MLflow server away for a while in the middle of training."""
    season.wait_for_training(2)
    season.stop_server()
    time.sleep(20)
    season.start_server()


def run(season: Season, events: Sequence[Event]) -> None:
    """Let the weeks pass."""
    season.start_server()
    season.bring(HISTORY_DAYS)
    for week, event in enumerate(events, start=1):
        if week > 1 and events[week - 2] == Event.FLIPPED:  # the partitions of the week before come again, fixed
            for back in range(1, 8):
                season.write_day(season.brought - dt.timedelta(days=back))
        if event == Event.NEW:
            season.tasks = list(synthetic_ads_tasks())
        if event == Event.RETIRE:
            season.tasks = [task for task in season.tasks if task.name != RETIRED_TASK]
            season.retired = [RETIRED_TASK]
        if event != Event.NOTHING:
            season.bring(7, {Event.BAD: malformed, Event.FLIPPED: flipped}.get(event))
        _week(season, week, event)
        if not season.short or week == len(events):
            day, champion = season.brought - dt.timedelta(days=1), season.champion()
            found = score_day(season.folder, day, season.registry().name, champion, season.registry().uri)
            say(f"week {week}: {found.rows} rows of {day} scored by {found.model}, {found.rejected} put aside")
    season.stop_server()


def _week(season: Season, week: int, event: Event) -> None:
    before = season.champion()
    if event == Event.FLIPPED:
        season.retrain(week, event, expect=3)
        assert season.champion() == before
        assert any(FLIPPED_TASK in reason for reason in season.weeks[-1].reasons), season.weeks[-1].reasons
        return
    if event == Event.NOTHING:
        season.retrain(week, event)
        assert season.champion() == before
        assert season.weeks[-1].verdict == "NOTHING_NEW"
        return
    if event == Event.WORKER:
        season.retrain(week, event, fault=lambda: kill_a_worker(season))
    elif event == Event.DRIVER:
        kill_the_driver(season)
        season.retrain(week, event)
    elif event == Event.SERVER:
        season.retrain(week, event, fault=lambda: kill_the_server(season))
    elif event == Event.TWICE:
        season.write_config()
        began, pair = time.monotonic(), [season.start(), season.start()]
        codes = sorted(process.wait(timeout=3600) for process in pair)
        assert codes == [0, 3], codes
        season.note(week, event, began)
    else:
        season.retrain(week, event)
    if event == Event.BAD:
        rejected = ShardManifest.read(season.newest_run() / "shards" / "manifest.json").rejected
        unreadable = sum(r.records for r in rejected if "is missing" in r.reason or "blank" in r.reason)
        assert unreadable >= 7 * len(season.tasks), rejected  # at least one row of each of seven days' files
    assert season.weeks[-1].verdict == "PROMOTE", season.weeks[-1]
    assert season.champion() > before
    if event == Event.ROLLBACK:
        entry = season.registry().rollback(why="complaints from the sales team")
        season.weeks[-1].champion = entry.version
        assert season.champion() == before


def check_samples(season: Season) -> int:
    """Make sure that along the champion's ancestry each valid record was trained on once, none lost, none twice."""
    registry = season.registry()
    version = registry.champion()
    trained: dict[str, str] = {}
    while version is not None:
        folder = season.folder / version.provenance.run
        config = load_config(folder / "config.yaml")
        first, last = (day.strftime("%Y%m%d") for day in map(_as_date, config.data.windows["train"]))
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        new = [f"{row['task']}/{row['key']}" for row in rows if row["key"][:8] >= first]
        expected = _train_keys(folder, first)
        assert sorted(new) == sorted(expected), f"{folder.name}: {len(new)} trained, {len(expected)} in its shards"
        assert not set(new) & trained.keys(), (
            f"{folder.name} repeats samples of {trained[next(iter(set(new) & trained.keys()))]}"
        )
        assert all(key.split("/")[1][:8] <= last for key in new)
        trained |= dict.fromkeys(new, folder.name)
        parent = version.provenance.parent
        version = registry.version(parent) if parent else None
    days = {key.split("/")[1][:8] for key in trained}
    until = registry.champion().provenance.trained_until
    want = {(START + dt.timedelta(days=n)).strftime("%Y%m%d") for n in range((until - START).days + 1)}
    assert days == want, f"days lost: {sorted(want - days)}"
    return len(trained)


def _train_keys(folder: Path, first: str) -> list[str]:
    samples = read_split(folder / "shards" / "manifest.json", "train")
    return [f"{sample.task}/{sample.key}" for sample in samples if sample.key[:8] >= first]


def _as_date(value: Any) -> dt.date:
    return value if isinstance(value, dt.date) else dt.date.fromisoformat(str(value))


def score_first(folder: Path, first: Predictor) -> dict[str, EvaluationReport]:
    """Score the first champion, left alone, on the holdout of every run; by the run's name."""
    known = {task.name for task in first.spec.tasks}
    found = {}
    for run_folder in evaluated(folder):
        manifest = run_folder / "shards" / "manifest.json"
        specs: list[TaskSpec] = [t for t in ShardManifest.read(manifest).tasks if t.name in known]
        samples = [sample for task in specs for sample in read_split(manifest, "test", task=task.name)]
        found[run_folder.name] = summarize(predict(first.scorer, samples), specs, model="never retrained", data={})
    return found


def measure(folder: Path, ads: SyntheticAdsConfig, first: Predictor) -> None:
    """Score the last weeks' models and the first one on the same days' samples of other data: many more of them than
    the loop itself had, on which the difference drowns in chance."""
    known = {task.name for task in first.spec.tasks}
    for run_folder in evaluated(folder)[-LAST_WEEKS:]:
        config = load_config(run_folder / "config.yaml")
        specs = [task for task in config.tasks if task.name in known]
        data = DataConfig(
            synthetic=ads,
            windows={"test": config.data.windows["test"]},
        )
        prepare(data, specs, run_folder / "measured", seed=0)
        samples = list(read_split(run_folder / "measured" / "manifest.json", "test"))
        retrained = Predictor.load(run_folder / "adapter")
        for name, predictor in (("retrained", retrained), ("first", first)):
            write_scores(run_folder / "measured" / f"scores_{name}.parquet", predict(predictor.scorer, samples))
            say(f"scored {len(samples)} samples of {run_folder.name} with the {name} model")


def evaluated(folder: Path) -> list[Path]:
    """Return the folders of the runs that were evaluated, the oldest first."""
    return sorted(path.parent for path in folder.glob("season-2026-*/scores.parquet"))


def main() -> None:
    """Run the season and write its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="four weeks on a cut model")
    parser.add_argument("--folder", type=Path, default=Path("runs/season"))
    arguments = parser.parse_args()
    ads = SyntheticAdsConfig(start=START, rows_per_day=20, drift=1.0)
    season = Season(arguments.folder.resolve(), ads, arguments.short)
    try:
        run(season, SHORT if arguments.short else FULL)
        season.start_server()
        samples = check_samples(season)
        say(f"{samples} samples of passed weeks, each trained on once")
        first = Predictor.load(season.registry().download(1, season.folder / "first"))
        measured_on = ads if season.short else ads.model_copy(update={"rows_per_day": MEASURED_ROWS_PER_DAY})
        measure(season.folder, measured_on, first)
        page = write_page(season.folder, season.weeks, score_first(season.folder, first), season.registry(), samples)
        say(f"season  {page}")
        gain = json.loads((season.folder / "season.json").read_text())["summary"]
        say(gain["words"])
        assert season.short or gain["ci95"][0] > 0, "retraining must gain, the intervals apart"
    finally:
        season.stop_server()


if __name__ == "__main__":
    main()
