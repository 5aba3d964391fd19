"""Weights of classes train: as weights of the records would, and over a stop and a start to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.contracts import TaskSpec
from pipeline.ingestion import DataConfig, prepare
from tests.pipeline.training.ranks import tiny_base
from tests.processes import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SPEC = {"name": "t", "template": "{text}:", "label_words": (" no", " yes"), "label_map": {"Exact": 1, "Irrelevant": 0}}
RUNS = {
    "plain": SPEC,
    "classes": {**SPEC, "class_weights": {"yes": 3}},
    "records": {**SPEC, "weight_field": "weight"},
}
WORKER = """
import json, sys
from pathlib import Path

from pipeline.contracts import TaskSpec
from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.training.config import TrainingConfig
from pipeline.training.loop import Trainer, TrainingJob
from pipeline.world import World


class Callbacks:
    def __init__(self, folder, stop):
        self.folder, self.stop, self.done = folder, stop, 0

    def started(self, step, num_steps):
        self.done = step

    def stops(self):
        self.done += 1
        return self.done == self.stop

    def log(self, row):
        with (self.folder / "history.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\\n")

    def trained_on(self, step, rank, samples):
        raise AssertionError("the ledger is off")


folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, (shards, spec, stops) in runs.items():
    for stop in stops:
        (folder / name).mkdir(exist_ok=True)
        job = TrainingJob(
            manifest_path=folder / shards / "manifest.json",
            tasks=(TaskSpec.model_validate(spec),),
            base=BaseModelConfig(base=str(folder / "base"), dtype="float32"),
            adapter=AdapterConfig(r=2, lora_dropout=0.0),
            training=TrainingConfig(
                global_batch_size=8, micro_batch_size=4, max_steps=4, checkpoint_steps=100, log_steps=1,
                learning_rate=1e-2,
            ),
            seed=3,
        )
        Trainer(job, World(0, 1), Callbacks(folder / name, stop), folder / name / "checkpoints").run()
"""


def test_class_weights_train_as_weights_of_the_records_do_and_resume(tmp_path: Path) -> None:
    rows = [
        {"text": f"text {i} {'good' if i % 3 == 0 else 'bad'}", "label": "Exact" if i % 3 == 0 else "Irrelevant"}
        for i in range(48)
    ]
    (tmp_path / "in" / "t").mkdir(parents=True)
    lines = [json.dumps({**row, "weight": 3 if row["label"] == "Exact" else 1}) + "\n" for row in rows]
    (tmp_path / "in" / "t" / "train.jsonl").write_text("".join(lines))
    for name, spec in RUNS.items():
        config = DataConfig(source="records", root=str(tmp_path / "in"))
        prepare(config, [TaskSpec.model_validate(spec)], tmp_path / f"shards-{name}", seed=0)
    tiny_base(tmp_path / "base")
    (tmp_path / "worker.py").write_text(WORKER)
    runs = {name: (f"shards-{name}", spec, [4]) for name, spec in RUNS.items()}
    runs["cut"] = ("shards-classes", RUNS["classes"], [2, 4])
    run_ranks(tmp_path / "worker.py", [tmp_path, json.dumps(runs)], 1)
    losses = {
        name: [json.loads(line)["loss"] for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in runs
    }
    assert losses["classes"] == losses["records"] == losses["cut"]
    assert len(losses["plain"]) == 4 and losses["plain"] != losses["classes"]
    ends = [
        (tmp_path / name / "checkpoints/step-00000004/adapter/adapter_model.safetensors").read_bytes()
        for name in ("classes", "records", "cut", "plain")
    ]
    assert ends[0] == ends[1] == ends[2] != ends[3]
