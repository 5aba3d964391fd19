"""Weeks of retraining, scoring and serving on a team's stack, in which something is killed at every turn: what is lost?

``python -m tests.benchmarks.soak [MINUTES [SEED]]``: PostgreSQL, SeaweedFS and MLflow's server stand as a team has
them, ``mtl-lora serve`` follows the champion and is asked all the time. Each round brings a week of data; retrains
while a rank, the command with its cluster or one of the three servers is killed; scores a day's input while that
command or the served model is killed; and trains the week once more undisturbed. Which is killed, and when, a seed
draws. The table goes to ``results/soak.json``. It is no part of the benchmarks that run by default: it takes an hour.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from infra.mlflow import services
from infra.mlflow.settings import Settings, make_settings
from pipeline.contracts import write_atomic
from pipeline.progress import say
from pipeline.synthetic import SyntheticAdsConfig
from tests.benchmarks.serving_load import Answers, ads_rows, load, process, replicas
from tests.benchmarks.timing import hardware, row, versions
from tests.infra.mlflow.conftest import destroy, free_ports
from tests.processes import free_port, kill_tree
from tests.season.__main__ import HISTORY_DAYS, START, Event, Season, check_samples, kill_a_worker
from tests.season.daily_scores import score_day

TABLE = Path(__file__).parent / "results" / "soak.json"
OUTAGE_S = 10.0
"""So long a killed server is away."""
FLAT = 1.2
"""What a process holds at the end may be so many times what it held after the first round."""
Fault = Callable[["Soak"], None]


class Soak(Season):
    """A season on a team's stack.

    Args:
        folder: everything goes there but the stack; emptied first.
        ads: the synthetic data.
        stack: PostgreSQL, SeaweedFS and MLflow's server.
        draw: of faults and moments.
    """

    def __init__(self, folder: Path, ads: SyntheticAdsConfig, stack: Settings, draw: random.Random) -> None:
        super().__init__(folder, ads, short=True)
        self.port, self.stack, self.draw = stack.mlflow_port, stack, draw

    def start_server(self) -> None:
        """Start what does not answer of the stack."""
        services.start(self.stack)

    def stop_server(self) -> None:
        """Leave the stack: who made it takes it away."""

    def kill_service(self, name: str) -> None:
        """Kill one of the stack's servers in the middle of training and bring it back after a while."""
        self.wait_for_training(2)
        if name == "postgres":
            pid = int((self.stack.data / "postgres/data/postmaster.pid").read_text().split()[0])
            os.kill(pid, signal.SIGQUIT)  # its processes end at once, nothing is written
        else:
            os.killpg(int((self.stack.data / f"{name}.pid").read_text()), signal.SIGKILL)
        time.sleep(OUTAGE_S)
        services.start(self.stack)


def kill_the_command(season: Soak) -> None:
    """Kill the retraining, its job and its cluster in the middle of training; who waits for it runs it again."""
    season.wait_for_training(season.draw.randint(1, 4))
    raise CommandKilledError


class CommandKilledError(Exception):
    """The command of this round is gone and must be run again."""


RETRAINING: dict[str, Fault] = {
    "a rank": kill_a_worker,
    "the command, its job and its cluster": kill_the_command,
    "MLflow's server": lambda season: season.kill_service("mlflow"),
    "the S3 server": lambda season: season.kill_service("s3"),
    "PostgreSQL": lambda season: season.kill_service("postgres"),
}
SCORING = ("the command of score", "the model that serves", "nothing")


def retrain(season: Soak, fault: Fault) -> tuple[int, float]:
    """Retrain with a fault; return the exit code of the command that ended, and the seconds of all."""
    season.write_config()
    begun, command = time.monotonic(), season.start()
    try:
        fault(season)
    except CommandKilledError:
        kill_tree(command)
        time.sleep(22)  # the lease of the killed one expires
        command = season.start()
    return command.wait(timeout=1800), time.monotonic() - begun


def adapter_digest(folder: Path) -> str:
    """Return a digest of a run's trained weights."""
    found = hashlib.sha256()
    for path in sorted((folder / "adapter").glob("*.safetensors")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def trained_undisturbed(season: Soak, run: Path) -> str:
    """Train a run's own configuration once more, with nothing killed; return the digest of its weights."""
    command = [sys.executable, "-m", "jobs.cli", "train", "--config", str(run / "config.yaml")]
    command += [f"run_root={season.folder / 'quiet'}", f"name={run.name}"]
    with (season.folder / "quiet.log").open("a") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True, timeout=1800)
    return adapter_digest(season.folder / "quiet" / run.name)


def score(season: Soak, fault: str) -> dict[str, Any]:
    """Score the newest day while something is killed; each row must come once, which :func:`score_day` asserts."""
    day, champion = season.brought - season.brought.resolution, season.champion()
    moment, done, killed = season.draw.uniform(5, 25), threading.Event(), threading.Event()

    def strike() -> None:
        if done.wait(moment):
            return
        if fault == "the model that serves":
            replicas()[0].kill()
            return
        for found in psutil.process_iter(["cmdline"]):
            words = found.info["cmdline"] or []
            if "jobs.cli" in words and "score" in words and str(season.folder) in " ".join(words):
                killed.set()
                for member in [*found.children(recursive=True), found]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
                return

    striker = threading.Thread(target=strike)
    if fault != "nothing":
        striker.start()
    try:
        try:
            told = score_day(season.folder, day, season.registry().name, champion, season.registry().uri)
        except AssertionError:
            if not killed.is_set():  # it failed by itself
                raise
            told = score_day(season.folder, day, season.registry().name, champion, season.registry().uri)
    finally:
        done.set()
        if striker.ident is not None:
            striker.join()
    return {"rows": told.rows, "rejected": told.rejected, "model": told.model}


def held(parents: list[psutil.Process]) -> dict[str, float]:
    """Return what processes and all below them hold: private memory in MiB, open files, threads, processes."""
    total = {"memory_mib": 0.0, "files": 0.0, "threads": 0.0, "processes": 0.0}
    for parent in parents:
        for member in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total["memory_mib"] += member.memory_full_info().uss / (1 << 20)
                total["files"] += member.num_fds()
                total["threads"] += member.num_threads()
                total["processes"] += 1
    return total


def left_behind(before: set[tuple[int, float]], standing: list[psutil.Process]) -> list[str]:
    """Return the processes that a round has left, a while after it."""
    deadline = time.monotonic() + 30
    while True:
        kept = {member.pid for parent in standing for member in [parent, *parent.children(recursive=True)]}
        found = []
        for each in psutil.process_iter(["pid", "create_time", "cmdline", "status"]):
            told = each.info
            is_new = (told["pid"], told["create_time"]) not in before and told["pid"] not in kept
            if is_new and told["status"] != psutil.STATUS_ZOMBIE and _is_ours(told["cmdline"] or []):
                found.append(" ".join(told["cmdline"])[:120])
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(1)


def _is_ours(words: list[str]) -> bool:
    line = " ".join(words)
    return any(word in line for word in ("ray::", "raylet", "gcs_server", "jobs.cli", "ray/dashboard", "ray/_private"))


def running() -> set[tuple[int, float]]:
    """Return the processes of this moment."""
    return {(each.info["pid"], each.info["create_time"]) for each in psutil.process_iter(["pid", "create_time"])}


def rounds(season: Soak, minutes: float) -> dict[str, Any]:
    """Let rounds pass until the time is over; return what came of them."""
    season.start_server()
    season.bring(HISTORY_DAYS)
    season.bring(7)
    season.retrain(1, Event.FIRST)
    found: dict[str, Any] = {"rounds": [], "held": [], "left": []}
    port, begun = free_port(), time.monotonic()
    arguments = ["jobs", "serve", "--model", f"models:/{season.registry().name}@champion", "--port", str(port)]
    arguments += ["--tracking-uri", season.registry().uri, "--poll-s", "1"]
    with process(arguments, f"http://127.0.0.1:{port}/readyz") as server, asked(port) as answers:
        served = psutil.Process(server.pid)
        while time.monotonic() - begun < 60 * minutes:
            number, before = len(found["rounds"]) + 2, running()
            fault, struck = season.draw.choice([*RETRAINING]), season.draw.choice(SCORING)
            season.bring(7)
            code, seconds = retrain(season, RETRAINING[fault])
            run = season.newest_run()
            told = {
                "killed": fault,
                "exit": code,
                "verdict": season.newest_result()["verdict"],
                "seconds": round(seconds),
                "killed_while_scoring": struck,
                "scored": score(season, struck),
                "same_bits": trained_undisturbed(season, run) == adapter_digest(run),
            }
            services_of_stack = [psutil.Process(int(path.read_text())) for path in season.stack.data.glob("*.pid")]
            found["left"] += left_behind(before, [served, *services_of_stack])
            found["rounds"].append(told)
            found["held"].append(held([served]))
            say(f"round {number}: {json.dumps(told)}")
    found["statuses"], found["requests"] = dict(answers[0].statuses), sum(answers[0].statuses.values())
    found["wrong"] = answers[0].wrong
    found["minutes"] = (time.monotonic() - begun) / 60
    found["samples"] = check_samples(season)
    return found


@contextlib.contextmanager
def asked(port: int) -> Iterator[list[Answers]]:
    """Ask a server all the time from two clients; the list has the answers once the block is over."""
    found: list[Answers] = []
    stop = threading.Event()

    def is_right(status: int, headers: Any, body: Any) -> bool:
        if status == 200:
            return all(0 <= answer["score"] <= 1 for answer in body["answers"])
        return status in (429, 503) and "Retry-After" in headers

    rows = [row for row in ads_rows(40) if row["task"] != "query_vertical"]
    bodies = [{"rows": rows[start : start + 4]} for start in range(0, len(rows), 4)]
    ask = {"clients": 2, "seconds": 1e6, "judge": is_right, "pause_s": 0.5, "stop": stop}
    url = f"http://127.0.0.1:{port}/v1/score"
    thread = threading.Thread(target=lambda: found.append(load(url, bodies, **ask)))
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def table(found: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return what came of the rounds as a benchmark's result."""
    done = found["rounds"]
    unfinished = sum(of["exit"] not in (0, 3) for of in done)
    apart = sum(not of["same_bits"] for of in done)
    lost = found["requests"] - sum(found["statuses"].get(status, 0) for status in ("200", "429", "503"))
    first, last = found["held"][0], found["held"][-1]
    rows = [
        row(
            f"retrainings of {len(done)}, something killed in each, without a verdict",
            "0",
            unfinished,
            unfinished == 0,
        ),
        row("of them whose weights are not the undisturbed training's, bit for bit", "0", apart, apart == 0),
        row("samples trained on along the champions, each once, none of them lost", "-", found["samples"], None),
        row(f"requests of {found['requests']} lost while serving", "0", lost, lost == 0, statuses=found["statuses"]),
        row("answers that were wrong, and refusals without Retry-After", "0", found["wrong"], found["wrong"] == 0),
        row("processes that a round left behind", "0", len(found["left"]), not found["left"], left=found["left"][:5]),
    ]
    for key in first if len(done) > 1 else ():  # one round has nothing to be held against
        ratio = last[key] / first[key]
        rows.append(
            row(f"the server's {key}, last round over first", f"<= {FLAT}", ratio, ratio <= FLAT, last=last[key])
        )
    return {
        "question": __doc__,
        "command": f"python -m tests.benchmarks.soak {found['minutes']:.0f} {seed}",
        "hardware": hardware(),
        "versions": versions("torch", "deepspeed", "ray", "mlflow"),
        "protocol": (
            "SmolLM2's first two layers, two ranks, eight or nine synthetic Ads tasks; each day's input is scored with "
            "every row once, which is asserted in each round; two clients ask the server twice a second"
        ),
        "rows": rows,
        "rounds": done,
        "not_measured": "full disks, slow networks, clock jumps; lost nodes: tests/pipeline/training/test_two_nodes.py",
    }


def main(arguments: list[str]) -> None:
    """Soak for so many minutes and write the table."""
    minutes, seed = float(arguments[0]) if arguments else 60.0, int(arguments[1]) if len(arguments) > 1 else 0
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    root.chmod(0o711)  # PostgreSQL's own user must reach its folder
    stack = make_settings(root / "stack", port=free_ports())
    os.environ["MLFLOW_WORKERS"] = "1"
    season = Soak(
        root / "season", SyntheticAdsConfig(start=START, rows_per_day=10, drift=1.0), stack, random.Random(seed)
    )
    try:
        found = rounds(season, minutes)
    finally:
        destroy(stack)
    write_atomic(TABLE, json.dumps(table(found, seed), indent=2) + "\n")
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
