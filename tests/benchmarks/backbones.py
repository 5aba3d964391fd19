"""What does an encoder cost and reach: MiniLM beside Hugging Face Trainer, beside SmolLM2, and on whole suites?

``python -m tests.benchmarks.backbones [PART ...]``: some of the parts ``speed``, ``ads``, ``glue`` and ``kill``; each
puts its rows into ``results/backbones.json``, in the place of older ones. A suite that was cut off goes on where it
was, and its seconds count from its start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.contracts import EvaluationReport, TaskResult, write_atomic
from pipeline.modeling.config import EMBEDDED, EMBEDDED_ENCODER
from tests.benchmarks.timing import hardware, row, versions
from tests.benchmarks.training_speed import ROWS, SUITE, environment, prepared, worker
from tests.pipeline.training.running_job import RunningJob, adapter_bytes, history, prepare_ground, write_config

TABLE = Path(__file__).parent / "results" / "backbones.json"
STEPS = {EMBEDDED_ENCODER: 16, EMBEDDED: 4}
RUNS = Path(tempfile.gettempdir()) / "mtl-lora-backbones"
WORST = {"wnli"}
"""Tasks whose test set is adversarial to their training set: told and not counted."""


def speed() -> list[dict[str, Any]]:
    """Time steps of MiniLM here and under Trainer, and of SmolLM2 on the same samples."""
    from pipeline.modeling.base_model import native_bfloat16

    settings, rows = {"manifest": str(prepared()), "rows": ROWS}, []
    for dtype in ("float32", *["bfloat16"] * native_bfloat16()):
        found = {
            (mode, base): worker(mode, {**settings, "dtype": dtype, "base": base, "steps": STEPS[base]})[0]
            for mode, base in (("ours", EMBEDDED_ENCODER), ("trainer_by_length", EMBEDDED_ENCODER), ("ours", EMBEDDED))
        }
        shown = {f"{m} {b}": {key: round(value, 1) for key, value in r.items()} for (m, b), r in found.items()}
        ours, theirs = (found[mode, EMBEDDED_ENCODER] for mode in ("ours", "trainer_by_length"))
        ratio = (ours["tokens"] / ours["cpu_s"]) / (theirs["tokens"] / theirs["cpu_s"])
        steps = {base: found["ours", base]["cpu_s"] / STEPS[base] for base in STEPS}
        share = steps[EMBEDDED_ENCODER] / steps[EMBEDDED]
        rows += [
            row(f"{dtype}: useful tokens/s, MiniLM over Trainer by length", ">= 2", ratio, ratio >= 2, measured=shown),
            row(f"{dtype}: time a step, MiniLM over SmolLM2", "<= 0.15", share, share <= 0.15, seconds=steps),
        ]
    return rows


def suite(name: str, limit_s: int = 900) -> list[dict[str, Any]]:
    """Train a packaged suite on MiniLM by the command, score its test split, and hold each task against the commonest
    answer."""
    spent = RUNS / f"{name}.seconds"
    before, start = float(spent.read_text()) if spent.is_file() else 0.0, time.perf_counter()
    config = [name, f"run_root={RUNS}", f"data.root={SUITE.parent}", f"model.base={EMBEDDED_ENCODER}", *_workers()]
    if not (RUNS / name / "adapter").is_dir():
        process = subprocess.Popen([sys.executable, "-m", "jobs.cli", "train", "--config", *config], env=environment())
        while process.poll() is None:
            time.sleep(1)
            RUNS.mkdir(exist_ok=True)
            spent.write_text(str(before + time.perf_counter() - start))
        if process.returncode:
            raise RuntimeError(f"training of {name} must end well, got code {process.returncode}")
    report = _scored(RUNS / name)
    seconds = before + time.perf_counter() - start
    labels = _commonest(RUNS / name / "shards")
    tasks = {task: _above(result, labels[task]) for task, result in report.tasks.items()}
    below = [task for task, found in tasks.items() if not found["above"] and task not in WORST]
    return [
        row(f"{name}: tasks whose interval lies above the commonest answer's metric, of {len(tasks)}",
            "all but wnli", sum(found["above"] for found in tasks.values()), not below, tasks=tasks, below=below),
        row(f"{name}: minutes to train and score, {_cores()} rank(s)", f"<= {limit_s // 60}", seconds / 60,
            seconds <= limit_s),
    ]  # fmt: skip


def _scored(folder: Path) -> EvaluationReport:
    """Return the report of a trained run on its test split."""
    from pipeline.evaluation.predict import predict
    from pipeline.evaluation.summary import summarize
    from pipeline.modeling.predictor import Predictor
    from pipeline.stream import read_split

    predictor = Predictor.load(folder / "adapter", "cpu")
    scores = predict(predictor.scorer, read_split(folder / "shards" / "manifest.json", "test"))
    return summarize(scores, predictor.spec.tasks, model=folder.name, data={"split": "test"})


def _cores() -> int:
    return int(os.environ.get("BENCHMARK_RANKS", "2"))


def _workers() -> list[str]:
    return [f"training.num_workers={_cores()}"]


def _commonest(shards: Path) -> dict[str, float]:
    """Return the share of each task's commonest label in its test split."""
    from pipeline.stream import load_manifest

    manifest = load_manifest(shards / "manifest.json")[0]
    shares = {}
    for task in manifest.tasks:
        counts: dict[str, int] = {}
        for shard in manifest.shards_of(task.name, "test"):
            for label, count in shard.label_counts.items():
                counts[label] = counts.get(label, 0) + count
        shares[task.name] = max(counts.values()) / sum(counts.values())
    return shares


def _above(result: TaskResult, share: float) -> dict[str, Any]:
    """Return a task's metric beside that of answering the commonest label always."""
    # Such an answer has an AUC of one half, and correlates with nothing; F1 is that of class 1, the commonest there.
    always = {"accuracy": share, "f1": 2 * share / (1 + share), "auc": 0.5}.get(result.metric, 0.0)
    low = result.ci95[0] if result.ci95 else None
    return {
        "metric": result.metric,
        "value": None if result.value is None else round(result.value, 4),
        "ci95": None if result.ci95 is None else [round(end, 4) for end in result.ci95],
        "commonest": round(always, 4),
        "above": low is not None and low > always,
    }


def kill() -> list[dict[str, Any]]:
    """Kill a rank of a run on MiniLM's first two layers, and compare with the unbroken run bit by bit."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare_ground(root)
        changes = (f"model.base={EMBEDDED_ENCODER}", "model.num_layers=2")
        with RunningJob(write_config(root, "whole", max_steps=8, checkpoint_steps=3), *changes) as whole:
            ended = [whole.end()]
        with RunningJob(write_config(root, "killed", max_steps=8, checkpoint_steps=3), *changes) as killed:
            killed.signal_rank(1, signal.SIGKILL, 4)
            ended.append(killed.end())
        is_same = ended == [0, 0] and adapter_bytes(whole.folder) == adapter_bytes(killed.folder)
        is_same = is_same and [r["loss"] for r in history(whole.folder)] == [r["loss"] for r in history(killed.folder)]
    return [row("kill -9 of a rank on an encoder run: adapter and losses bit by bit the same", "1", is_same, is_same)]


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "speed": speed,
    "ads": lambda: suite("ads_real"),
    "glue": lambda: suite("glue_real"),
    "kill": kill,
}


def main(names: list[str]) -> None:
    """Run the parts that are named, or all."""
    for name in names or list(PARTS):
        start, before = time.perf_counter(), hardware()
        rows = [{**each, "part": name} for each in PARTS[name]()]
        known = json.loads(TABLE.read_text()) if TABLE.is_file() else {"rows": [], "parts": {}}
        parts = known["parts"] | {name: {"hardware": before, "seconds": round(time.perf_counter() - start, 1)}}
        every = [each for each in known["rows"] if each["part"] != name] + rows
        table = {
            "question": __doc__.split("\n")[0],
            "command": "python -m tests.benchmarks.backbones",
            "hardware": before,
            "versions": versions("torch", "deepspeed", "ray", "transformers", "peft"),
            "protocol": (
                "MiniLM-L6 and SmolLM2-135M, adapters of r = 8 on attention, dropout 0.05. Speed: the ads suite's 9 "
                f"tasks in their proportions, {ROWS} rows a batch, one process of one thread, by processor time; "
                f"{STEPS} steps after one of warm-up, evenly spaced among an epoch's batches in order of tokens. "
                "Trainer: PEFT's LoRA on transformers' classifier, one for the classes of all tasks, "
                "LengthGroupedSampler over the whole data, padding to the longest of a batch; the base in the same "
                "type on both sides. Suites: mtl-lora train of ads_real and glue_real with "
                "model.base=minilm-l6, which adapts whole blocks (jobs/configs/minilm.yaml), and the number of ranks "
                "that the row names."
            ),
            "rows": sorted(every, key=lambda each: list(PARTS).index(each["part"])),
            "parts": parts,
            "not_measured": "accelerators, more threads, other encoders",
        }
        write_atomic(TABLE, json.dumps(table, indent=2) + "\n")
        for each in rows:
            print(json.dumps({key: each[key] for key in ("measure", "goal", "value", "met")}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
