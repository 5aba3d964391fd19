"""One process and two real ranks against a plain torch loop: the same losses, and a resumed run's bits."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.ingestion import DataConfig, prepare
from pipeline.stream import MixedStream
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks
from tests.processes import launch_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 6
WORKER = """
import json, os, shutil, signal, sys
from pathlib import Path

from pipeline.synthetic import synthetic_ads_tasks
from pipeline.modeling.adapter import AdapterConfig
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.training.config import TrainingConfig
from pipeline.training.loop import Trainer, TrainingJob
from pipeline.world import World

rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
parent, manifest, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])


class Callbacks:
    def started(self, step, num_steps):
        pass

    def stops(self):
        return False

    def log(self, row):
        with (folder / "history.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\\n")

    def trained_on(self, step, rank, samples):
        with (folder / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([step, [f"{s.task}/{s.key}" for s in samples]]) + "\\n")
        if stop and step == stop:  # the step after the checkpoint
            os.kill(os.getpid(), signal.SIGKILL)


for run in json.loads(sys.argv[4]):
    folder, stop = parent / run["name"], run.get("stop", 0)
    if "unmarked_as" in run:  # as if it had been killed after its best checkpoint, before that was marked
        shutil.copytree(folder, folder := parent / run["unmarked_as"])
        best = (folder / "checkpoints" / "best").read_text().strip()
        (folder / "checkpoints" / "best").unlink()
        for later in (folder / "checkpoints").glob("step-*"):
            if later.name > best:
                shutil.rmtree(later)
    if "cut_as" in run:  # as if it had been killed after its first checkpoint
        shutil.copytree(folder, folder := parent / run["cut_as"])
        for later in sorted((folder / "checkpoints").glob("step-*"))[1:]:
            shutil.rmtree(later)
    folder.mkdir(exist_ok=True)
    training = TrainingConfig(
        num_workers=ranks, zero_stage=run["stage"], global_batch_size=8,
        checkpoint_steps=3, log_steps=1, ledger=True,
        **{"max_steps": steps, "learning_rate": 1e-2, "micro_batch_tokens": 40, **run.get("settings", {})},
    )
    job = TrainingJob(
        manifest_path=manifest, tasks=synthetic_ads_tasks(),
        base=BaseModelConfig(num_layers=2, dtype="float32"),
        adapter=AdapterConfig(r=4, lora_dropout=run.get("dropout", 0.0), **run.get("adapter", {})),
        training=training, seed=3,
    )
    assert Trainer(job, World(rank, ranks), Callbacks(), folder / "checkpoints").run()
"""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    config = DataConfig(synthetic=SyntheticAdsConfig(rows_per_day=12, days=4))
    prepare(config, synthetic_ads_tasks(), folder, seed=0)
    return folder / "manifest.json"


def _train(folder: Path, manifest: Path, ranks: int, runs: list[dict[str, Any]], expected_code: int = 0) -> str:
    """Train runs (name, stage, settings, dropout, step to be killed after) one after the other, a process a rank."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    codes, told = launch_ranks(script, [folder, manifest, STEPS, json.dumps(runs)], ranks, timeout_s=540)
    killed = any(run.get("stop") for run in runs)
    assert -signal.SIGKILL in codes if killed else all(code == expected_code for code in codes), told
    return told


WEIGHTS: dict[str, Any] = {
    "uncertainty_weighting": True,
    "label_smoothing": 0.1,
    "task_weights": {"query_ad_relevance": 2.0},
}
ON_HOST = {"offload_optimizer": True, "activation_checkpointing": True}
SCHEDULES = [{"schedule": name, "warmup_share": 0.5} for name in ("linear", "cosine", "constant")]
MOVING: dict[str, Any] = {
    "adapter": {"temperature_start": 2.0, "mixing_spread": 1.0},
    "settings": {"orthogonality": 0.1, "task_learning_rate": 5e-3, "mixing_learning_rate": 2e-2},
}
UNEVEN = {"micro_batch_tokens": 100}
EPOCH: dict[str, Any] = {"max_steps": None, "epochs": 0.3}
VALIDATION = {
    "validation": {"every_steps": 1, "split": "test", "samples_per_task": 16, "patience": 2},
    "learning_rate": 0.3,
    "micro_batch_tokens": 1024,
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, manifest: Path) -> Path:
    folder = tmp_path_factory.mktemp("one_rank")
    runs: list[dict[str, Any]] = [{"name": f"zero{stage}", "stage": stage} for stage in range(4)]
    runs += [{"name": f"host{stage}", "stage": stage, "settings": ON_HOST} for stage in (1, 2, 3)]
    runs += [{"name": "plain", "stage": 2, "dropout": 0.1}]
    runs += [{"name": "measured", "stage": 2, "dropout": 0.1, "settings": {"conflict_steps": 2}}]
    validation = {"name": "validation", "stage": 1, "settings": VALIDATION}
    runs += [validation, validation | {"unmarked_as": "unmarked"}]
    runs += [{"name": "moving", "stage": stage, **MOVING} | more for stage, more in ((2, {}), (2, {"cut_as": "cut"}))]
    _train(folder, manifest, 1, runs)
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, manifest: Path) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    runs: list[dict[str, Any]] = [{"name": f"zero{stage}", "stage": stage} for stage in range(4)]
    for stage in (1, 3):
        runs += [{"name": f"weights{stage}", "stage": stage, "settings": WEIGHTS}]
        ended = {"name": f"validation{stage}", "stage": stage, "settings": VALIDATION}
        runs += [ended, ended]  # taken up again it adds no step
    runs += [{"name": "whole", "stage": 2, "dropout": 0.1}]
    runs += [{"name": f"uneven{stage}", "stage": stage, "settings": UNEVEN} for stage in (0, 1, 2)]
    runs += [{"name": f"epoch{stage}", "stage": stage, "settings": EPOCH} for stage in (0, 3)]
    runs += [{"name": str(settings["schedule"]), "stage": 1, "settings": settings} for settings in SCHEDULES]
    _train(folder, manifest, 2, runs)
    return folder


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


def _plain_losses(
    manifest: Path, steps: int, settings: dict[str, Any] | None = None, samples: int | None = None
) -> list[float]:
    """The same run without DeepSpeed, ranks or micro-batches, on padded rows: the slow reference."""
    import torch

    from pipeline.modeling.adapter import AdapterConfig, build_adapter
    from pipeline.modeling.base_model import BaseModelConfig, load_base, load_tokenizer
    from pipeline.modeling.encoding import Encoder
    from pipeline.modeling.scoring import LabelScorer
    from pipeline.training.config import TrainingConfig
    from pipeline.training.objective import Objective
    from pipeline.world import World

    base, tasks = BaseModelConfig(num_layers=2, dtype="float32", packed_rows=False), synthetic_ads_tasks()
    torch.manual_seed(3)
    names = [task.name for task in tasks]
    adapted = build_adapter(AdapterConfig(r=4, lora_dropout=0.0), load_base(base), names)
    config = TrainingConfig(**settings or {})
    objective = Objective(LabelScorer(adapted), names, config)
    encoder = Encoder(load_tokenizer(base), tasks, base.max_length)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(config, step, steps))
    stream, losses = MixedStream(manifest, 3, 8), []
    for step in range(steps):
        left = None if samples is None else samples - 8 * step
        batch = encoder.collate(encoder.encode(stream.samples(step, World(0, 1))[:left]))
        loss, plain, _ = objective(batch)
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(plain.mean()))
    return losses


def _rate(config: Any, step: int, steps: int) -> float:
    """The learning rate's factor by its definition: a rise from zero, then the schedule over what is left."""
    warmup = round(config.warmup_share * steps)
    if step < warmup:
        return step / warmup
    left = (steps - step) / (steps - warmup)
    cosine = (1 - math.cos(math.pi * left)) / 2
    return {"linear": left, "cosine": cosine, "constant": 1.0}[config.schedule]


def test_schedules_equal_one_plain_process(two_ranks: Path, manifest: Path) -> None:
    for settings in SCHEDULES:
        expected = _plain_losses(manifest, STEPS, settings)
        assert _losses(two_ranks / str(settings["schedule"])) == pytest.approx(expected, abs=2e-4), settings
        assert expected != pytest.approx(_plain_losses(manifest, STEPS), abs=2e-4)


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_losses_equal_one_plain_process_under_every_stage(
    ranks: str, manifest: Path, request: pytest.FixtureRequest
) -> None:
    expected = _plain_losses(manifest, STEPS)
    for stage in range(4):
        losses = _losses(request.getfixturevalue(ranks) / f"zero{stage}")
        assert losses == pytest.approx(expected, abs=2e-4), f"ZeRO {stage}"


def test_ranks_may_have_other_numbers_of_micro_batches(two_ranks: Path, manifest: Path) -> None:
    from pipeline.modeling.base_model import BaseModelConfig, load_tokenizer
    from pipeline.modeling.encoding import Encoder
    from pipeline.modeling.packing import micro_batches
    from pipeline.world import World

    encoder = Encoder(load_tokenizer(BaseModelConfig()), synthetic_ads_tasks(), BaseModelConfig().max_length)
    stream = MixedStream(manifest, 3, 8)
    counts = [
        [
            len(micro_batches(encoder.encode(stream.samples(step, World(rank, 2))), UNEVEN["micro_batch_tokens"]))
            for rank in (0, 1)
        ]
        for step in range(STEPS)
    ]
    assert any(one != other for one, other in counts), counts
    expected = _plain_losses(manifest, STEPS)
    for stage in (0, 1, 2):
        assert _losses(two_ranks / f"uneven{stage}") == pytest.approx(expected, abs=2e-4), f"ZeRO {stage}"


def test_losses_with_the_optimizer_on_the_host_are_the_same(one_rank: Path, manifest: Path) -> None:
    expected = _plain_losses(manifest, STEPS)
    for stage in (1, 2, 3):
        assert _losses(one_rank / f"host{stage}") == pytest.approx(expected, abs=2e-4), f"ZeRO {stage}"


def test_learnt_task_weights_equal_one_plain_process(two_ranks: Path, manifest: Path) -> None:
    expected = _plain_losses(manifest, STEPS, WEIGHTS)
    for stage in (1, 3):
        assert _losses(two_ranks / f"weights{stage}") == pytest.approx(expected, abs=2e-4), f"ZeRO {stage}"
    assert expected != pytest.approx(_plain_losses(manifest, STEPS), abs=2e-4)


def test_a_run_in_epochs_ends_with_the_last_sample(two_ranks: Path, manifest: Path) -> None:
    # Of the last step rank 1 has nothing.
    stream = MixedStream(manifest, 3, 8)
    samples = round(EPOCH["epochs"] * stream.num_samples)
    assert 0 < samples % 8 <= 4
    steps = samples // 8 + 1
    expected = _plain_losses(manifest, steps, samples=samples)
    for stage in (0, 3):
        run = two_ranks / f"epoch{stage}"
        assert _losses(run) == pytest.approx(expected, abs=2e-4), f"ZeRO {stage}"
        parts = [
            [json.loads(line) for line in (run / f"rank-{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
        ]
        given = [key for (_, one), (_, other) in zip(*parts, strict=True) for key in (*one, *other)]
        assert given == [key for step in range(steps) for key in stream.global_batch(step)][:samples]
        assert parts[1][-1] == [steps - 1, []]
        rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        assert rows[-1]["samples"] == samples


def test_a_number_that_is_not_finite_stops_every_rank_and_names_the_samples(tmp_path: Path, manifest: Path) -> None:
    run = {"name": "burst", "stage": 2, "settings": {"learning_rate": 1e30, "gradient_clipping": 0.0}}
    told = _train(tmp_path, manifest, 2, [run], expected_code=1)
    assert told.count("every loss and gradient must be finite") == 2
    assert any(f"of samples {task.name}/" in told for task in synthetic_ads_tasks())
    assert not list((tmp_path / "burst" / "checkpoints").glob("step-*"))


def test_resumed_run_ends_with_the_same_bits(tmp_path: Path, two_ranks: Path, manifest: Path) -> None:
    run = {"name": "cut", "stage": 2, "dropout": 0.1}
    _train(tmp_path, manifest, 2, [run | {"stop": 3}])  # the step after the checkpoint
    _train(tmp_path, manifest, 2, [run])
    assert _losses(tmp_path / "cut") == _losses(two_ranks / "whole")
    adapters = [
        folder / "checkpoints/step-00000006/adapter/adapter_model.safetensors"
        for folder in (two_ranks / "whole", tmp_path / "cut")
    ]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_moving_temperature_is_where_its_step_says_in_every_checkpoint_and_after_a_cut(one_rank: Path) -> None:
    from safetensors.torch import load_file

    for step, expected in ((3, math.log(2.0 / 0.1) / 2), (6, 0.0)):
        found = []
        for run in ("moving", "cut"):
            folder = one_rank / run / "checkpoints" / f"step-{step:08d}" / "adapter"
            found.append((folder / "adapter_model.safetensors").read_bytes())
        assert found[0] == found[1]
        tensors = load_file(folder / "adapter_model.safetensors")
        moved = [float(value) for name, value in tensors.items() if name.endswith("lora_temperature")]
        assert moved == pytest.approx([expected] * 8)


def test_validation_keeps_the_best_adapter_and_ends_a_run_without_progress(two_ranks: Path, manifest: Path) -> None:
    for stage in (1, 3):
        run = two_ranks / f"validation{stage}"
        rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        macros = [row["validation_macro"] for row in rows]
        best = macros.index(max(macros)) + 1
        assert len(rows) == min(best + 2, STEPS)
        marks = list(run.rglob("best"))
        assert [mark.read_text().strip() for mark in marks] == [f"step-{best:08d}"]
        adapter = marks[0].parent / f"step-{best:08d}" / "adapter"
        assert _values(adapter, manifest, 16) == pytest.approx(rows[best - 1]["validation"], abs=1e-6)


def test_a_best_checkpoint_that_was_not_marked_is_marked_on_resume(one_rank: Path) -> None:
    marks = [(one_rank / name / "checkpoints" / "best").read_text() for name in ("validation", "unmarked")]
    assert marks[0] == marks[1]
    whole, best = _losses(one_rank / "validation"), int(marks[0].strip().rpartition("-")[2])
    assert _losses(one_rank / "unmarked") == whole + whole[best:]  # the copied rows, and those made again


def _values(adapter: Path, manifest: Path, samples_per_task: int) -> dict[str, float]:
    """Each task's metric and their mean, by the evaluation stage's own code on the saved adapter."""
    from itertools import islice

    from pipeline.evaluation.predict import predict
    from pipeline.evaluation.summary import summarize
    from pipeline.modeling.adapter import load_adapter
    from pipeline.modeling.base_model import BaseModelConfig, load_base, load_tokenizer
    from pipeline.modeling.encoding import Encoder
    from pipeline.modeling.scoring import LabelScorer, Scorer
    from pipeline.stream import read_split

    base, tasks = BaseModelConfig(num_layers=2, dtype="float32"), synthetic_ads_tasks()
    adapted = load_adapter(load_base(base), adapter, [task.name for task in tasks])
    scorer = Scorer(LabelScorer(adapted), Encoder(load_tokenizer(base), tasks, base.max_length))
    samples = [s for task in tasks for s in islice(read_split(manifest, "test", task=task.name), samples_per_task)]
    report = summarize(predict(scorer, samples), tasks, model="x", data={}, replicates=20)
    values = {name: result.value for name, result in report.tasks.items()} | {"macro": report.macro.value}
    return {name: float(value) for name, value in values.items() if value is not None}


def test_conflict_between_tasks_is_measured_and_changes_nothing(one_rank: Path) -> None:
    assert _losses(one_rank / "measured") == _losses(one_rank / "plain")
    rows = [json.loads(line) for line in (one_rank / "measured" / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "gradient_conflict" in row] == [2, 4, 6]
    assert all(-1 <= cosine <= 1 for row in rows for cosine in row.get("gradient_cosine", {}).values())
