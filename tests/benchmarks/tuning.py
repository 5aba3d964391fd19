"""Is what a search of 16 trials finds better than the defaults that it starts from, on a test split it has not seen?

For each of three suites of ``../shared/data`` a validation split is carved from the train split; the search is judged
on it alone. The defaults and the configuration that the search recommends are then trained for the same steps and
compared on the test split, sample by sample. What is done of a suite stays in the folder ``TUNING_FOLDER``: a benchmark
that was interrupted goes on from there.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from jobs.config import RunConfig, load_config
from jobs.config_file import PACKAGED
from jobs.run_folder import RunFolder
from jobs.stages.plan import training_job
from jobs.tuning.search import tune
from jobs.tuning.trials import Search
from pipeline.contracts import write_atomic
from pipeline.evaluation.compare import compare
from pipeline.evaluation.predict import predict
from pipeline.evaluation.score_table import read_scores, write_scores
from pipeline.modeling.adapter import load_adapter
from pipeline.modeling.answering import class_scorer, sample_encoder
from pipeline.modeling.base_model import load_base
from pipeline.modeling.predictor import default_device
from pipeline.modeling.scoring import Scorer
from pipeline.stream import read_split
from pipeline.training.checkpoint import Checkpoints
from tests.benchmarks.timing import hardware, row, versions

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
FOLDER = Path(os.environ.get("TUNING_FOLDER") or Path(tempfile.gettempdir()) / "mtl-lora-tuning")
SPLITS = ("train", "validation", "test")
SUITES = ("ads", "glue", "reviews")
STEPS, BATCH, MEASURED, MAX_LENGTH = 40, 16, 10, 40
"""Steps of a run, samples of a step, steps between two measurements, tokens of a prompt."""
VALIDATION, TRAIN, TEST = 240, 1500, 300
"""Samples of a measurement over all tasks, most samples a task of the train and the test split."""
CARVED_SHARE = 0.25
"""Most of a task's train samples that are carved off."""
TUNE: dict[str, Any] = {
    "space": {
        "training.learning_rate": {"log_uniform": [1.0e-3, 3.0e-2]},
        "adapter.r": {"choice": [4, 8, 16]},
        "adapter.temperature": {"log_uniform": [0.1, 1.0]},
        "mixture": {"choice": ["proportional", {"kind": "temperature", "temperature": 2.0}]},
    },
    "trials": 16,
    "asha": {"grace_steps": MEASURED, "reduction": 4},
    "max_concurrent": 1,
}


def carve(task: Path, into: Path, most: int) -> None:
    """Write a task's files again, at most so many samples of ``train`` carved off as ``validation``, drawn by a hash of
    their first text: those that share it stay together."""
    into.mkdir(parents=True, exist_ok=True)
    with gzip.open(task / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = list(lines)

    def place(line: str) -> str:
        return hashlib.sha256(str(json.loads(line).get("text_a")).encode()).hexdigest()

    rows.sort(key=place)
    count = min(most, int(CARVED_SHARE * len(rows)))
    while count < len(rows) and place(rows[count]) == place(rows[count - 1]):
        count += 1
    for split, part in (("validation", rows[:count]), ("train", rows[count : count + TRAIN])):
        with gzip.open(into / f"{split}.jsonl.gz", "wt", encoding="utf-8", compresslevel=1) as file:
            file.writelines(part)
    (into / "test.jsonl.gz").write_bytes((task / "test.jsonl.gz").read_bytes())


def configuration(suite: str, folder: Path) -> Path:
    """Write the packaged configuration of a suite with the benchmark's budget, and return its path."""
    values = yaml.safe_load((PACKAGED / f"{suite}.yaml").read_text())
    for task in values["tasks"]:
        if not (folder / "data" / task / "test.jsonl.gz").is_file():
            carve(DATA / suite / task, folder / "data" / task, 2 * VALIDATION // len(values["tasks"]))
    values |= {"name": suite, "run_root": str(folder / "runs"), "tune": TUNE}
    files = {task: {split: f"{task}/{split}.jsonl.gz" for split in SPLITS} for task in values["tasks"]}
    values["data"] |= {"root": str(folder / "data"), "files": files, "max_samples": {"test": TEST}}
    values["model"] |= {"base": "minilm-l6", "dtype": "float32", "max_length": MAX_LENGTH}
    values["training"] = {
        "num_workers": 1,
        "max_steps": STEPS,
        "global_batch_size": BATCH,
        "validation": {"every_steps": MEASURED, "samples_per_task": VALIDATION // len(values["tasks"])},
    }
    values["evaluation"] = {"num_workers": 1}
    path = folder / f"{suite}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def scored(config: RunConfig) -> pd.DataFrame:
    """Return a trial's scores of the test split, by the adapter that was its best on the validation split."""
    job, table = training_job(config), config.folder / "test.parquet"
    if not table.is_file():
        checkpoint = Checkpoints(RunFolder(config.folder).checkpoints, job.adapter_sha256).best()
        if checkpoint is None:
            raise RuntimeError(f"{config.folder} must hold the checkpoint that was best on validation, it has none")
        names = [task.name for task in config.tasks]
        adapted = load_adapter(load_base(config.model, default_device()), checkpoint / "adapter", names)
        scorer = Scorer(class_scorer(adapted), sample_encoder(config.model, config.tasks))
        samples = [sample for name in names for sample in read_split(config.manifest_path, "test", name)]
        write_scores(table, predict(scorer, samples))
    return read_scores(table)


def measured(suite: str) -> dict[str, Any]:
    """Search, then compare what was found with the defaults on the test split; what is done of a suite is kept."""
    folder = FOLDER / suite
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    path = configuration(suite, folder)
    start = time.perf_counter()
    try:
        found = tune(load_config(path))
    finally:
        with path.with_suffix(".seconds").open("a") as file:
            file.write(f"{time.perf_counter() - start:.1f}\n")
    trials = Search(load_config(path))
    best, default = trials.trial(found["best_trial"]), trials.trial(0)
    for trial in (found["best_trial"], 0):
        if found["states"][trial] != "finished":
            raise RuntimeError(f"trial {trial} of {suite} must have done all its steps, it is {found['states'][trial]}")
    compared = compare(
        scored(best),
        scored(default),
        best.tasks,
        candidate_name="best",
        reference_name="defaults",
        data={"split": "test"},
    )
    seconds = sum(float(line) for line in path.with_suffix(".seconds").read_text().split())
    values = found | {"seconds": seconds, "compared": compared.model_dump(mode="json")}
    for place in ("config", "page"):
        del values[place]
    write_atomic(result, json.dumps(values))
    return values


def run() -> dict[str, Any]:
    """Search on every suite, one after the other."""
    rows, is_better, is_worse = [], 0, 0
    for suite in SUITES:
        found = measured(suite)
        macro = found["compared"]["macro"]
        low, high = macro["ci95"]
        is_better, is_worse = is_better + (low > 0), is_worse + (high < 0)
        rows.append(
            row(
                f"{suite}: best of {TUNE['trials']} trials minus the defaults, macro on the held-out test",
                "not worse",
                macro["difference"],
                high >= 0,
                ci95=[round(low, 4), round(high, 4)],
                best=round(macro["candidate"], 4),
                defaults=round(macro["reference"], 4),
                validation=round(found["macro"], 4),
                values=found["values"],
                states={state: found["states"].count(state) for state in sorted(set(found["states"]))},
                seconds=round(found["seconds"]),
                tasks={
                    name: [round(task["difference"], 4), task["ci95"]]
                    for name, task in found["compared"]["tasks"].items()
                },
            )
        )
    rows.append(
        row("suites of three on which the search is better, its interval above zero", ">= 2", is_better, is_better >= 2)
    )
    rows.append(row("suites on which it is worse, its interval below zero", "0", is_worse, is_worse == 0))
    return {
        "question": __doc__.split("\n")[0],
        "command": "python -m tests.benchmarks tuning",
        "hardware": hardware(),
        "versions": versions("torch", "ray", "deepspeed"),
        "protocol": (
            f"scaled down: minilm-l6 in fp32 under the packaged configurations, {STEPS} steps of {BATCH} "
            f"samples, prompts of at most {MAX_LENGTH} tokens, {VALIDATION} validation samples over all tasks, carved "
            f"from train and measured every {MEASURED} steps, at most {TRAIN} train and {TEST} "
            f"test samples a task; search: "
            f"{json.dumps(TUNE)}; the defaults are the search's first trial, the configuration as it stands; both "
            "models are the checkpoints that were best on validation; 95 % intervals of the paired difference of the "
            "macro metric over the tasks"
        ),
        "rows": rows,
        "not_measured": "longer trainings, language models as the base, other seeds of the search",
    }
