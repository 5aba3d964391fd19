"""Does training go faster and in less memory than Hugging Face Trainer with PEFT LoRA?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.timing import hardware, row, versions

SUITE = Path(__file__).resolve().parents[3] / "shared" / "data" / "ads"
ROWS = 32
STEPS = {"ours": 5, "ours_by_beginning": 4, "trainer_by_length": 3, "trainer": 2}


def prepared() -> Path:
    """Write the ads suite's shards, or find them written, and return their manifest."""
    from jobs.config import load_config
    from jobs.main_job import run_stage
    from jobs.run import Run

    data = [f"data.root={SUITE}", "data.max_samples={}", "model.dtype=float32"]
    folder = Path(tempfile.gettempdir()) / "mtl-lora-benchmarks"
    config = load_config(Path("ads_real"), [f"run_root={folder}", "name=ads", *data])
    run_stage(Run(config), "prepare")
    return Path(config.manifest_path)


def environment() -> dict[str, str]:
    """Return the environment of a worker: one thread, no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def worker(mode: str, settings: dict[str, Any], ranks: int | None = None) -> list[dict[str, Any]]:
    """Run a worker, or with ``ranks`` so many under torchrun, and return what each tells."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.json"
        path.write_text(json.dumps({**settings, "folder": folder}))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
        command = [sys.executable, *launcher, "-m", "tests.benchmarks.training_worker", mode, str(path)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if "RESULT {" in line]
    if done.returncode or not lines:
        raise RuntimeError(f"{mode} must end well, got code {done.returncode}: {done.stderr[-2000:]}")
    return [json.loads(line.partition("RESULT ")[2]) for line in lines]


def run() -> dict[str, Any]:
    """Measure ours and theirs one after another, in float32 and, where the processor multiplies it, in bfloat16."""
    from pipeline.modeling.base_model import native_bfloat16

    settings = {"manifest": str(prepared()), "rows": ROWS}
    rows = []
    for dtype in ("float32", *["bfloat16"] * native_bfloat16()):
        found = {m: worker(m, {**settings, "dtype": dtype, "steps": steps})[0] for m, steps in STEPS.items()}
        rows += _rows(dtype, found)
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks training_speed",
        "hardware": hardware(),
        "versions": versions("torch", "deepspeed", "transformers", "peft"),
        "protocol": (
            f"SmolLM2-135M, all 30 layers, adapters of r = 8 on q, k, v, o, dropout 0.05; the ads suite's 9 tasks "
            f"in their proportions, rows up to 256 tokens, {ROWS} rows a batch; one process of one thread each; "
            f"{STEPS} steps after one of warm-up, at evenly spaced places of an epoch's batches in order of tokens; "
            "useful tokens: those of the rows' prompts. Ours: packed rows, lengths grouped over 64 steps, or lengths "
            "and beginnings over 500, DeepSpeed ZeRO 1. Trainer: DataCollatorForSeq2Seq, random order or "
            "LengthGroupedSampler over the whole data. bfloat16: the base loaded so, on both sides."
        ),
        "rows": rows,
        "not_measured": "accelerators, more threads",
    }


def _rows(dtype: str, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    shown = {mode: {key: round(value, 1) for key, value in result.items()} for mode, result in found.items()}
    memory = found["ours"]["peak_mib"] / found["trainer"]["peak_mib"]

    def faster(ours: str, theirs: str, goal: float) -> dict[str, Any]:
        value = found[ours]["tokens_per_s"] / found[theirs]["tokens_per_s"]
        return row(f"{dtype}: useful tokens/s, {ours} over {theirs}", f">= {goal:g}", value, value >= goal)

    return [
        faster("ours", "trainer", 4) | {"measured": shown},
        faster("ours", "trainer_by_length", 2),
        faster("ours_by_beginning", "trainer", 4),
        faster("ours_by_beginning", "trainer_by_length", 2),
        row(f"{dtype}: peak memory of the process, ours over trainer", "<= 0.7", memory, memory <= 0.7),
    ]
