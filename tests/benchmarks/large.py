"""How much memory does a model take that is larger than a device: by rank, by bits, merged, exported, as planned?"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.ingestion import DataConfig, prepare
from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.base_model import BaseModelConfig, empty_base
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from pipeline.training.config import TrainingConfig
from pipeline.training.counts import count_model
from pipeline.training.loop import TrainingJob
from pipeline.training.memory import rank_memory
from tests.benchmarks.timing import hardware, row, versions
from tests.pipeline.training.layouts import layout_folder
from tests.processes import launch_ranks

STEPS, LONG, BATCH = 20, 50, 8
LAYOUT = "llama-3.1-8b"
GIB = 1 << 30
_LAUNCHER = "import runpy, sys; runpy.run_module('tests.benchmarks.large_worker', run_name='__main__')\n"


def _job(folder: Path, steps: int, ranks: int, zero_stage: int, quantization: str | None = None) -> TrainingJob:
    return TrainingJob(
        manifest_path=folder / "manifest.json",
        tasks=synthetic_ads_tasks(),
        base=BaseModelConfig(dtype="bfloat16", quantization=quantization),
        adapter=AdapterConfig(lora_dropout=0.0),
        training=TrainingConfig(
            num_workers=ranks,
            zero_stage=zero_stage,
            global_batch_size=BATCH,
            micro_batch_tokens=1024,
            max_steps=steps,
            epochs=5.0,
            log_steps=1,
            checkpoint_steps=10_000,
            learning_rate=1e-3,
        ),
        seed=0,
    )


def _train(job: TrainingJob, folder: Path, name: str) -> dict[str, Any]:
    """Run a job's ranks and return what rank 0 tells, its memory being the most of any rank's; or what was told."""
    told = folder / f"{name}.json"
    if told.is_file():
        return json.loads(told.read_text())  # type: ignore[no-any-return]
    (folder / f"{name}.pickle").write_bytes(pickle.dumps(job))
    script = folder / "rank.py"
    script.write_text(_LAUNCHER)
    codes, text = launch_ranks(script, [folder / f"{name}.pickle"], job.training.num_workers, timeout_s=590)
    if any(codes):
        raise RuntimeError(f"{name}: a rank ended with {codes}: {text}")
    found = [json.loads(line.removeprefix("RESULT ")) for line in text.splitlines() if line.startswith("RESULT ")]
    result = min(found, key=lambda rank: rank["rank"])
    result |= {key: max(rank[key] for rank in found) for key in ("loading", "loaded", "training", "resident")}
    told.write_text(json.dumps(result))
    return result  # type: ignore[no-any-return]


def _planned(folder: Path, job: TrainingJob, measured: dict[str, Any]) -> dict[str, Any]:
    from pipeline.orchestration.calibration import calibrate
    from pipeline.training.planner import calibration_job, plan_training

    plan = plan_training(job, calibrate(calibration_job(job)), folder, is_local=False)
    return {"planned": plan.rank_bytes, "measured": measured["resident"]}


def partitioned(folder: Path) -> list[dict[str, Any]]:
    """Train two ranks under every stage."""
    jobs = {stage: _job(folder, STEPS, 2, stage) for stage in range(4)}
    found = {stage: _train(job, folder, f"zero{stage}") for stage, job in jobs.items()}
    whole = found[0]["frozen"]
    # At the steps' peak activations and the adapter stand beside the base; without ZeRO 3 the base is one whole copy.
    beside = found[0]["training"] - whole
    shares = {
        "loading": found[3]["loading"] / whole,
        "loaded": found[3]["loaded"] / whole,
        "training": (found[3]["training"] - beside) / whole,
    }
    apart = {
        stage: max(abs(a - b) / b for a, b in zip(found[stage]["losses"], found[0]["losses"], strict=True))
        for stage in (1, 2, 3)
    }
    least = max(apart[1], apart[2])
    return [
        row(
            "base memory a rank, ZeRO 3, two ranks, at most, over a whole copy",
            "<= 0.6",
            max(shares.values()),
            max(shares.values()) <= 0.6,
            shares=shares,
            zero_0={key: found[0][key] / whole for key in ("loading", "loaded", "training")},
            whole_mib=whole >> 20,
        ),
        row(
            f"losses of {STEPS} steps, ZeRO 3 over ZeRO 0: largest share apart",
            "<= that of ZeRO 1 and 2",
            apart[3],
            apart[3] <= least,
            zero_1=apart[1],
            zero_2=apart[2],
        ),
        *_planner_rows(folder, {f"ZeRO {s}, two ranks": (jobs[s], found[s]) for s in jobs}),
    ]


def _planner_rows(folder: Path, runs: dict[str, tuple[TrainingJob, dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for words, (job, measured) in runs.items():
        both = _planned(folder, job, measured)
        ratio = both["planned"] / both["measured"]
        rows.append(row(f"planned memory over measured, {words}", "0.85 to 1.15", ratio, 0.85 <= ratio <= 1.15, **both))
    return rows


def quantized(folder: Path) -> list[dict[str, Any]]:
    """Train the same steps on the base in bf16, in 4 and in 8 bit."""
    jobs = {kind: _job(folder, LONG, 1, 1, kind) for kind in (None, "4bit", "8bit")}
    found = {kind: _train(job, folder, f"bits-{kind}") for kind, job in jobs.items()}
    last = {kind: sum(result["losses"][-10:]) / 10 for kind, result in found.items()}
    counts = count_model(empty_base(jobs[None].base), jobs[None].adapter, jobs[None].tasks)
    layout = _layout_counts(folder, "llama-2-7b")
    held = {kind: rank_memory(layout, num_ranks=1, zero_stage=1, width=2, quantization=kind).weights for kind in jobs}
    share = found["4bit"]["frozen"] / found[None]["frozen"]
    planned = rank_memory(counts, num_ranks=1, zero_stage=1, width=2, quantization="4bit").weights
    apart = {kind: abs(last[kind] / last[None] - 1) for kind in ("4bit", "8bit")}
    return [
        row(
            "memory of the frozen weights, 4 bit over bf16, SmolLM2-135M (a fifth of it embeddings)",
            "<= 0.35",
            share,
            share <= 0.35,
            planned_over_measured=planned / found["4bit"]["frozen"],
            eight_bit=found["8bit"]["frozen"] / found[None]["frozen"],
            held_after_loading=found["4bit"]["loaded"] / found[None]["loaded"],
        ),
        row("the same, planned for the layout of LLaMA-2-7B", "<= 0.35", held["4bit"] / held[None], None),
        row(
            f"loss after {LONG} steps, 4 bit over bf16: share apart, mean of the last 10",
            "<= 0.02",
            apart["4bit"],
            apart["4bit"] <= 0.02,
            eight_bit=apart["8bit"],
            losses={str(kind): value for kind, value in last.items()},
        ),
        *_planner_rows(folder, {"4 bit, one rank": (jobs["4bit"], found["4bit"])}),
    ]


def _layout_counts(folder: Path, name: str) -> Any:
    layout = BaseModelConfig(base=str(layout_folder(folder / "layouts", name)), dtype="bfloat16")
    return count_model(empty_base(layout, layout_only=True), AdapterConfig(), synthetic_ads_tasks())


def files(folder: Path) -> list[dict[str, Any]]:
    """Export and merge a task of a model of 8 thousand million random weights."""
    told = folder / "files.json"
    if not told.is_file():
        run = [sys.executable, "-m", "tests.benchmarks.large_files", LAYOUT, str(folder / "files")]
        done = subprocess.run(
            run, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        shutil.rmtree(folder / "files")
        told.write_text(done.stdout.partition("RESULT ")[2])
    found = json.loads(told.read_text())
    return [
        row(
            f"{what} of a task, {LAYOUT} in bf16: peak memory of the process, GiB",
            "<= 3",
            found[what] / GIB,
            found[what] <= 3 * GIB,
            seconds=found[f"{what}_s"],
            model_gib=found["whole"] / GIB,
        )
        for what in ("export", "merge")
    ]


def run() -> dict[str, Any]:
    """Measure ranks of two processes, a base in fewer bits, and files of 16 GB; MTL_LORA_LARGE names a folder in which
    what was measured stays, so that a run that was cut off goes on."""
    kept = os.environ.get("MTL_LORA_LARGE")
    folder = Path(kept or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "manifest.json").is_file():
            ads = SyntheticAdsConfig(rows_per_day=60, days=4)
            prepare(DataConfig(synthetic=ads), synthetic_ads_tasks(), folder, 0)
        rows = [*partitioned(folder), *quantized(folder), *files(folder)]
    finally:
        if kept is None:
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks large",
        "hardware": hardware(),
        "versions": versions("torch", "deepspeed", "transformers", "bitsandbytes", "accelerate", "peft"),
        "protocol": (
            f"SmolLM2-135M whole in bf16, MTL-LoRA of r = 8 on q, k, v, o, synthetic ads, 9 tasks, {BATCH} samples a "
            "step; ranks are processes of one thread; memory is anonymous memory over that of the process before the "
            "base is loaded, looked at every 2 ms, the most of any rank; planned memory is that of a calibrated plan, "
            "over the most resident memory of a rank's process, files that it maps included; the merged and exported "
            f"model has the layout of {LAYOUT} with random weights of 16 GB, its peak is the process' whole anonymous "
            "memory"
        ),
        "rows": rows,
        "not_measured": "accelerators, more than two ranks, offloading to a disk",
    }
