"""Do two ranks halve the time, are losses those of a plain loop, does Ray cost nothing, does the planner know?"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.timing import hardware, row, versions
from tests.benchmarks.training_speed import prepared, worker
from tests.benchmarks.training_worker import job_of

ROWS, STEPS = 32, 7
EQUAL_STEPS, EQUAL_LAYERS = 4, 4


def _under_ray(settings: dict[str, Any], training: dict[str, Any]) -> list[dict[str, Any]]:
    from pipeline.orchestration.cluster import cluster
    from pipeline.orchestration.config import RayConfig
    from pipeline.orchestration.training import train

    with tempfile.TemporaryDirectory() as folder, cluster(RayConfig()):
        train(job_of(settings, **training), Path(folder), None)
        return [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]


def run() -> dict[str, Any]:
    """Measure the same steps on one rank, on two, on two under Ray, and plan them."""
    from pipeline.orchestration.calibration import calibrate
    from pipeline.training.loop import job_stream
    from pipeline.training.planner import calibration_job, plan_training

    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"manifest": str(prepared()), "rows": ROWS}
        common = {"max_steps": STEPS, "log_steps": 1, "checkpoint_steps": 1000}
        two = {**common, "num_workers": 2}
        job = job_of(settings, **two)
        stream = job_stream(job)
        tokens = [sum(min(length, job.base.max_length) for length in stream.lengths(step)) for step in range(STEPS)]
        plan = plan_training(job, calibrate(calibration_job(job)), Path(folder), is_local=True)
        alone = worker("rank", {**settings, "training": common}, ranks=1)
        both = worker("rank", {**settings, "training": two}, ranks=2)
        ray_rows = _under_ray(settings, two)
        losses = worker("equal", {**settings, "steps": EQUAL_STEPS, "num_layers": EQUAL_LAYERS, "dropout": 0.0})[0]
    apart = max(abs(a - b) for a, b in zip(losses["ours"], losses["plain"], strict=True))

    def seconds(rows: list[dict[str, Any]]) -> float:
        """Of the steps after the first, which warms up."""
        return sum(t / r["tokens_per_s"] for t, r in list(zip(tokens, rows, strict=True))[1:])

    def history(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return next(result["rows"] for result in results if result["rank"] == 0)

    one_s, two_s, ray_s = seconds(history(alone)), seconds(history(both)), seconds(ray_rows)
    peak = max(result["peak_mib"] for result in both)
    planned_s = plan.seconds * sum(tokens[1:]) / sum(tokens)
    memory, time = plan.rank_bytes / 2**20 / peak, planned_s / ray_s
    measured = {"one_s": one_s, "two_s": two_s, "ray_s": ray_s, "planned_s": planned_s, "peak_mib": peak}
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks training_scaling",
        "hardware": hardware(),
        "versions": versions("torch", "deepspeed", "ray"),
        "protocol": (
            f"SmolLM2-135M fp32, all 30 layers, ads suite, {ROWS} rows a step over all ranks, the first {STEPS} steps "
            "less one of warm-up, one thread a rank, ZeRO 1; torchrun and Ray run the same loop"
        ),
        "rows": [
            row("two ranks: speed over one", ">= 1.7", one_s / two_s, one_s / two_s >= 1.7, measured=measured),
            row("two ranks under Ray: speed over torchrun", ">= 0.97", two_s / ray_s, two_s / ray_s >= 0.97),
            row(
                f"largest difference of a loss from a plain loop's, {EQUAL_STEPS} steps, {EQUAL_LAYERS} layers",
                "<= 0.0002",
                apart,
                apart <= 2e-4,
                losses=losses,
            ),
            row("planned memory of a rank: over its peak", "0.8 to 1.2", memory, 0.8 <= memory <= 1.2),
            row("planned time: over the time under Ray", "0.7 to 1.3", time, 0.7 <= time <= 1.3),
        ],
        "plan": plan.model_dump(mode="json"),
        "not_measured": "more than two ranks, accelerators, the planned time of runs that are not calibrated",
    }
