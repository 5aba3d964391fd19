"""How much memory does a model take that is larger than a device: by rank, by bits, merged, exported, as planned?"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from pipeline.ingestion import DataConfig, prepare
from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.base_model import BaseModelConfig, empty_base, native_bfloat16
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from pipeline.training.config import TrainingConfig
from pipeline.training.counts import count_model
from pipeline.training.loop import TrainingJob
from pipeline.training.memory import rank_memory
from tests.benchmarks.large_files import LAYOUT, scaled_layout
from tests.benchmarks.timing import hardware, row, versions
from tests.memory import anonymous_bytes
from tests.pipeline.training.layouts import layout_folder
from tests.processes import launch_ranks

STEPS, LONG, BATCH = 20, 50, 8
GIB = 1 << 30
QUANTIZED = (
    "memory of the frozen weights, 4 bit",
    "the same, planned for the layout of LLaMA-2-7B",
    f"loss after {LONG} steps",
    "planned memory over measured, 4 bit",
)
"""How the rows of :func:`quantized` begin."""
RESULT = Path(__file__).parent / "results" / "large.json"
KINDS: tuple[Literal["4bit", "8bit"] | None, ...] = (None, "4bit", "8bit")
_LAUNCHER = "import runpy, sys; runpy.run_module('tests.benchmarks.large_worker', run_name='__main__')\n"


def _job(folder: Path, steps: int, ranks: int, zero_stage: int, base: BaseModelConfig | None = None) -> TrainingJob:
    live = {"stage3_max_live_parameters": 6_000_000, "stage3_max_reuse_distance": 6_000_000}  # as scaled as the base is
    return TrainingJob(
        manifest_path=folder / "manifest.json",
        tasks=synthetic_ads_tasks(),
        base=base or BaseModelConfig(dtype="auto"),
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
            deepspeed={"zero_optimization": live} if zero_stage == 3 else {},
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
    result |= {key: max(rank[key] for rank in found) for key in ("loading", "loaded", "held", "training", "resident")}
    told.write_text(json.dumps(result))
    return result  # type: ignore[no-any-return]


def _planned(folder: Path, job: TrainingJob, measured: dict[str, Any], words: str) -> dict[str, Any]:
    """Return the planned memory of a rank beside the measured one; or what was told."""
    told = folder / f"plan-{words.replace(' ', '-')}.json"
    if told.is_file():
        return json.loads(told.read_text())  # type: ignore[no-any-return]
    from pipeline.orchestration.calibration import calibrate
    from pipeline.training.planner import calibration_job, plan_training

    plan = plan_training(job, calibrate(calibration_job(job)), folder, is_local=False)
    both = {"planned": plan.rank_bytes, "measured": measured["resident"]}
    told.write_text(json.dumps(both))
    return both


def _shares(found: dict[str, Any]) -> dict[str, float]:
    """Return what a rank has of the base, over a whole copy: the process while it reads, and after; its tensors in the
    steps, at most."""
    return {key: found[key] / found["frozen"] for key in ("loading", "loaded", "held")}


def partitioned(folder: Path) -> list[dict[str, Any]]:
    """Train two ranks under every stage, and under the first and the last on a base of a large one's proportions."""
    jobs = {stage: _job(folder, STEPS, 2, stage) for stage in range(4)}
    found = {stage: _train(job, folder, f"zero{stage}") for stage, job in jobs.items()}
    scaled = BaseModelConfig(base=str(scaled_layout(folder / "scaled")), dtype="auto")
    large = {stage: _train(_job(folder, 2, 2, stage, scaled), folder, f"scaled{stage}") for stage in (0, 3)}
    rows = []
    for words, runs in (("a base of Llama-3.1-8B's proportions", large), ("SmolLM2-135M", found)):
        shares, whole = _shares(runs[3]), runs[3]["frozen"]
        most = max(shares.values())
        measure = f"base memory a rank, ZeRO 3, two ranks, at most, over a whole copy: {words}"
        rows.append(row(measure, "<= 0.6", most, most <= 0.6, shares=shares, whole_mib=whole >> 20))
    exact = BaseModelConfig(dtype="float32")
    name = "exact" if native_bfloat16() else "zero"  # elsewhere the runs above are exact
    plain = {stage: _train(_job(folder, STEPS, 2, stage, exact), folder, f"{name}{stage}") for stage in (0, 1, 3)}
    apart = {
        stage: max(abs(a - b) / b for a, b in zip(plain[stage]["losses"], plain[0]["losses"], strict=True))
        for stage in (1, 3)
    }
    return [
        *rows,
        row(
            f"losses of {STEPS} steps in fp32, ZeRO 3 over ZeRO 0: largest share apart, times that of ZeRO 1",
            "<= 2",
            apart[3] / apart[1],
            apart[3] <= 2 * apart[1],
            apart={f"ZeRO {stage}": share for stage, share in apart.items()},
        ),
        *_planner_rows(folder, {f"ZeRO {s}, two ranks": (jobs[s], found[s]) for s in jobs}),
    ]


def _planner_rows(folder: Path, runs: dict[str, tuple[TrainingJob, dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for words, (job, measured) in runs.items():
        both = _planned(folder, job, measured, words)
        ratio = both["planned"] / both["measured"]
        rows.append(row(f"planned memory over measured, {words}", "0.85 to 1.15", ratio, 0.85 <= ratio <= 1.15, **both))
    return rows


def quantized(folder: Path) -> list[dict[str, Any]]:
    """Train the same steps on the base in bf16, in 4 and in 8 bit."""
    jobs = {kind: _job(folder, LONG, 1, 1, BaseModelConfig(dtype="bfloat16", quantization=kind)) for kind in KINDS}
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


def _of_bfloat16(folder: Path) -> list[dict[str, Any]]:
    """Measure the bases in fewer bits, where bf16 is native; elsewhere the rows stay that another machine gave."""
    if native_bfloat16():
        return quantized(folder)
    known = json.loads(RESULT.read_text())
    kept = [shown for shown in known["rows"] if shown["measure"].startswith(QUANTIZED)]
    return [{"hardware": known["hardware"], **shown} for shown in kept]


def _layout_counts(folder: Path, name: str) -> Any:
    layout = BaseModelConfig(base=str(layout_folder(folder / "layouts", name)), dtype="bfloat16")
    return count_model(empty_base(layout, layout_only=True), AdapterConfig(), synthetic_ads_tasks())


def files(folder: Path) -> list[dict[str, Any]]:
    """Export and merge a task of a model of 8 thousand million random weights."""
    told = folder / "files.json"
    if not told.is_file():
        run = [sys.executable, "-m", "tests.benchmarks.large_files", str(folder / "files")]
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


def driver(folder: Path) -> list[dict[str, Any]]:
    """Train, score and export with a base of two layers and with the whole one: what the run's own process holds."""
    told = folder / "driver.json"
    if not told.is_file():
        told.write_text(
            json.dumps({str(layers): _driver_peak(folder / f"driver-{layers}", layers) for layers in (2, 30)})
        )
    peaks = json.loads(told.read_text())
    counts = {
        layers: count_model(empty_base(BaseModelConfig(num_layers=layers)), AdapterConfig(), synthetic_ads_tasks())
        for layers in (2, 30)
    }
    more = 4 * ((counts[30].linear + counts[30].plain) - (counts[2].linear + counts[2].plain))
    share = (peaks["30"] - peaks["2"]) / more
    return [
        row(
            "driver of a run, prepare to export: memory it takes more for a larger base, over what the base has more",
            "0 within 0.1",
            share,
            abs(share) <= 0.1,
            peak_mib={f"{layers} layers": peak >> 20 for layers, peak in peaks.items()},
            more_mib=more >> 20,
        )
    ]


def _driver_peak(folder: Path, layers: int) -> int:
    """Return the most anonymous memory of the process of a whole run, its workers apart."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = [f"run_root={folder}", "name=driver", f"model.num_layers={layers}", "data.synthetic.rows_per_day=40"]
    sets += ["data.synthetic.days=4", "training.max_steps=2", "training.global_batch_size=8"]
    with (folder / "log").open("w") as log:
        run = [sys.executable, "-m", "jobs", "retrain", "--config", "demo", *sets]
        process, most = subprocess.Popen(run, stdout=log, stderr=log), 0
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):  # it has just ended
                most = max(most, anonymous_bytes(process.pid))
            time.sleep(0.01)
    if process.returncode not in (0, 3):  # 3: trained, scored and exported, and held back by the gates
        raise RuntimeError(f"the run must end, got {process.returncode}: {(folder / 'log').read_text()[-2000:]}")
    return most


def run() -> dict[str, Any]:
    """Measure ranks of two processes, a base in fewer bits, files of 16 GB and a run's own process; MTL_LORA_LARGE
    names a folder in which what was measured stays, so that a run that was cut off goes on."""
    kept = os.environ.get("MTL_LORA_LARGE")
    folder = Path(kept or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "manifest.json").is_file():
            ads = SyntheticAdsConfig(rows_per_day=60, days=4)
            prepare(DataConfig(synthetic=ads), synthetic_ads_tasks(), folder, 0)
        rows = [*partitioned(folder), *_of_bfloat16(folder), *files(folder), *driver(folder)]
    finally:
        if kept is None:
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks large",
        "hardware": hardware(),
        "versions": versions("torch", "deepspeed", "transformers", "bitsandbytes", "accelerate", "peft"),
        "protocol": (
            "SmolLM2-135M whole, in bf16 where it is native (4 and 8 bit beside it nowhere else), else in fp32, "
            f"MTL-LoRA of r = 8 on q, k, v, o, synthetic ads, 9 tasks, {BATCH} samples a step; ranks are processes of "
            "one thread; memory is anonymous memory over that of the process before the "
            "base is loaded, looked at every 2 ms, the most of any rank; planned memory is that of a calibrated plan, "
            "over the most resident memory of a rank's process, files that it maps included; the merged and exported "
            f"model has the layout of {LAYOUT} with random weights of 16 GB, its peak is the process' whole anonymous "
            "memory"
        ),
        "rows": rows,
        "not_measured": (
            "accelerators, more than two ranks, offloading to a disk; "
            "tests/pipeline/training/device_cases.py counts the host's waits"
        ),
    }
