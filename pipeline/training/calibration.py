"""A few micro-batches of the real model on real samples: what a rank computes a second, and what memory it takes."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from pipeline.modeling.adapter import build_adapter
from pipeline.modeling.answering import class_scorer, classes_of_heads
from pipeline.modeling.base_model import load_base
from pipeline.modeling.packing import Batch, pack
from pipeline.training.engine import device
from pipeline.training.loop import TrainingJob, job_stream
from pipeline.training.objective import Objective
from pipeline.training.plan import Calibration
from pipeline.training.planner import sampled_examples, sampled_steps

_TOKENS = (64, 192, 576)
"""Computed tokens of the micro-batches: the first one warms up, a line through the others tells the rest."""


def measure(job: TrainingJob) -> Calibration:
    """Measure a job in this process; :func:`pipeline.orchestration.calibration.calibrate` gives it one of its own."""
    where = device()
    _reset_peak(where)
    start = time.perf_counter()
    names = [task.name for task in job.tasks]
    base = load_base(job.base, where)
    objective = Objective(
        class_scorer(build_adapter(job.adapter, base, names, classes_of_heads(base, job.tasks)).to(where)),
        names,
        job.training,
    ).train()
    loading, loaded = _peak_bytes(where), _held_bytes(where)
    loading_seconds = time.perf_counter() - start
    stream = job_stream(job)
    steps = sampled_steps(stream, job.training.num_steps(stream.epoch_samples))
    # From all steps alternately, so that short and long rows stand together.
    by_step = sampled_examples(job, stream, steps)
    mixed = [examples[place] for place in range(len(by_step[0])) for examples in by_step]
    tokens, seconds, peaks = [], [], []
    for wanted in _TOKENS:
        chosen = mixed[:1]
        for example in mixed[1:]:
            if sum(e.num_tokens for e in chosen) >= wanted:
                break
            chosen.append(example)
        batch = pack(chosen).to(where)
        _reset_peak(where)
        seconds.append(
            _best_of(2 if wanted < _TOKENS[-1] else 1, partial(_forward_and_backward, objective, batch), where)
        )
        tokens.append(len(batch.input_ids))
        peaks.append(_peak_bytes(where))
    with torch.no_grad():
        scoring = _best_of(1, partial(objective.eval(), batch), where)
    span = max(tokens[2] - tokens[1], 1)
    slope = max((seconds[2] - seconds[1]) / span, seconds[2] / tokens[2] / 2)
    return Calibration(
        seconds_per_batch=max(seconds[1] - slope * tokens[1], 0.0),
        seconds_per_token=slope,
        loading_bytes=loading,
        loaded_bytes=loaded,
        bytes_per_token=max(peaks[2] - loaded, 0) / tokens[2],
        seconds_per_scored_token=scoring / tokens[2],
        loading_seconds=loading_seconds,
    )


def _forward_and_backward(objective: Objective, batch: Batch) -> None:
    objective(batch)[0].sum().backward()


def _best_of(times: int, work: Callable[[], object], where: torch.device) -> float:
    """Return the fewest seconds that some work took."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        work()
        if where.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _status_bytes(key: str) -> int:
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _reset_peak(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes(where: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if where.type == "cuda" else _status_bytes("VmHWM:")


def _held_bytes(where: torch.device) -> int:
    return torch.cuda.memory_allocated() if where.type == "cuda" else _status_bytes("VmRSS:")


def main() -> None:
    """Read a job, pickled by the parent process, from standard input and print its :class:`Calibration`."""
    print(measure(pickle.load(sys.stdin.buffer)).model_dump_json(), flush=True)  # noqa: T201
